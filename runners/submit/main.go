// The submit runner: see package runners/step/submit.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/submit"
)

func main() { step.Main(submit.Command()) }
