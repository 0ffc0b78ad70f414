// The evaluate runner: see package runners/step/evaluate.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/evaluate"
)

func main() { step.Main(evaluate.Command()) }
