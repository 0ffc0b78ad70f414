// The verify runner: see package runners/step/verify.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/verify"
)

func main() { step.Main(verify.Command()) }
