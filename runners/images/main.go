// The images runner: see package runners/step/images.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/images"
)

func main() { step.Main(images.Command()) }
