// The serve runner: see package runners/step/serve.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve"
)

func main() { step.Main(serve.Command()) }
