// Serve answers inference requests for a signed model.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve"
)

func main() { step.Main(serve.Command()) }
