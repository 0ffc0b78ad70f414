// The summary runner: see package runners/step/summary.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/summary"
)

func main() { step.Main(summary.Command()) }
