// The promote runner: see package runners/step/promote.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/promote"
)

func main() { step.Main(promote.Command()) }
