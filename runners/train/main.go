// The train runner: see package runners/step/train.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/train"
)

func main() { step.Main(train.Command()) }
