package selftest

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/nn"
)

var description = nn.Description{
	Name: "t", Input: nn.Shape{Height: 3, Width: 3, Channels: 1},
	Layers: []nn.Layer{{Conv: &nn.Conv{Filters: 4, Kernel: 2, ReLU: true}}, {Dense: &nn.Dense{Units: 5}}},
}

func TestVector(t *testing.T) {
	n, err := nn.New(description, 1)
	if err != nil {
		t.Fatal(err)
	}
	pixels := make([]byte, 20*9)
	labels := make([]uint8, 20)
	for i := range pixels {
		pixels[i] = byte(rand.Int())
	}
	for i := range labels {
		labels[i] = uint8(i % 5)
	}
	text, err := Vector(n, pixels, labels)
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(n, ""); err != nil {
		t.Error(err)
	}
	// Examples of five classes that a random network puts into one are refused, others pass.
	if err := Run(n, text); err != nil && !strings.Contains(err.Error(), "all put into one") {
		t.Error(err)
	}
	if _, err := Vector(n, pixels[1:], labels); err == nil {
		t.Error("pixels that do not fit the labels were accepted")
	}
	labels[0] = 5
	if _, err := Vector(n, pixels, labels); err == nil {
		t.Error("a label that the network does not have was accepted")
	}

	// A class that always wins: the outputs still follow the input.
	_, bias := n.Weights(1)
	bias[2] = 100
	labels[0] = 0
	text, err = Vector(n, pixels, labels)
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(n, text); err == nil || !strings.Contains(err.Error(), "all put into one") {
		t.Errorf("a model that always answers 2: %v", err)
	}

	for _, hostile := range []string{"{", `{"pixels":"","labels":[],"logits":[]}`, strings.Replace(text, `"logits":[`, `"logits":[1,`, 1), strings.Repeat(" ", maxVector+1)} {
		if err := Run(n, hostile); err == nil {
			t.Errorf("%.50q: accepted", hostile)
		}
	}
}
