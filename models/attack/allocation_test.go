package attack_test

import (
	"runtime"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/zoo"
)

// Once warm, a loop of PGD allocates nothing but closures, the same few hundred
// bytes for any batch. On one processor, as each goroutine's scratch memory is
// made when it first gets work.
func TestStepsAllocateNoTensors(t *testing.T) {
	d, err := zoo.LoadNetwork("paper")
	if err != nil {
		t.Fatal(err)
	}
	net, err := nn.New(d, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const n = 64
	m, err := graph.NewFastAttack(net, n)
	if err != nil {
		t.Fatal(err)
	}
	x, clean, labels := make([]float32, n*net.Input.Size()), make([]float32, n*net.Input.Size()), make([]uint8, n)
	loop := attack.Loop{Model: m, Ball: attack.Linf(0.3), Alpha: 0.1}
	loss := attack.CrossEntropy(labels, 10)
	step := func() {
		if err := loop.Ascend(x, clean, n, 1, loss); err != nil {
			t.Fatal(err)
		}
	}
	step()
	const steps = 20
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range steps {
		step()
	}
	runtime.ReadMemStats(&after)
	bytes, allocations := (after.TotalAlloc-before.TotalAlloc)/steps, (after.Mallocs-before.Mallocs)/steps
	t.Logf("a step makes %d allocations of %d bytes", allocations, bytes)
	if bytes > 512 { // the smallest tensor, the logits of half the batch, has 1,280
		t.Errorf("a step allocates %d bytes", bytes)
	}
}
