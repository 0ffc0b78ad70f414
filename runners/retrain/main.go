// The retrain runner: see package runners/step/retrain.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/retrain"
)

func main() { step.Main(retrain.Command()) }
