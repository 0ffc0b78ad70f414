// The sign runner: see package runners/step/sign.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/sign"
)

func main() { step.Main(sign.Command()) }
