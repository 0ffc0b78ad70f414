// The check runner: see package runners/step/check.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/check"
)

func main() { step.Main(check.Command()) }
