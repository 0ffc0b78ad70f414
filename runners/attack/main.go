// The attack runner: see package runners/step/attack.
package main

import (
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/attack"
)

func main() { step.Main(attack.Command()) }
