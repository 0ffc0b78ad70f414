// The choose runner: see package runners/step/choose.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/choose"
)

func main() { step.Main(choose.Command()) }
