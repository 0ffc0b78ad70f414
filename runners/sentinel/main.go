// Sentinel watches the requests to a served model.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/sentinel"
)

func main() { step.Main(sentinel.Command()) }
