// The fetch runner: see package runners/step/fetch.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/fetch"
)

func main() { step.Main(fetch.Command()) }
