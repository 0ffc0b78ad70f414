// The pack runner: see package runners/step/pack.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/pack"
)

func main() { step.Main(pack.Command()) }
