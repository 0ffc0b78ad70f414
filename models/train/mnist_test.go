package train_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/dataset"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/zoo"
)

func mnist(t testing.TB) (*dataset.Splits, *zoo.Model, *nn.Network) {
	t.Helper()
	data, err := dataset.MNIST()
	if err != nil {
		t.Fatal(err)
	}
	model, err := zoo.Load("wong")
	if err != nil {
		t.Fatal(err)
	}
	net, err := nn.New(model.Network, 1)
	if err != nil {
		t.Fatal(err)
	}
	return data, model, net
}

// accuracy is that of the network on the set under an attack; none for "".
func accuracy(t testing.TB, net *nn.Network, set *dataset.Set, spec string, threat attack.Threat) float64 {
	t.Helper()
	m, err := graph.NewAttack(net, 256)
	if err != nil {
		t.Fatal(err)
	}
	size := net.Input.Size()
	x, right := make([]float32, set.Len()*size), 0
	set.Read(x, 0, set.Len())
	if spec != "" {
		a, err := attack.Parse(spec, threat)
		if err != nil {
			t.Fatal(err)
		}
		if x, err = a.Perturb(context.Background(), m, x, set.Labels, 99); err != nil {
			t.Fatal(err)
		}
	}
	for lo := 0; lo < set.Len(); lo += m.Batch() {
		hi := min(lo+m.Batch(), set.Len())
		logits, err := m.Logits(x[lo*size:hi*size], hi-lo)
		if err != nil {
			t.Fatal(err)
		}
		for i, y := range set.Labels[lo:hi] {
			if attack.Predict(logits[i*10:(i+1)*10]) == int(y) {
				right++
			}
		}
	}
	return float64(right) / float64(set.Len())
}

// TestMNIST trains on 4,096 images: plainly, which FGSM breaks, and
// then robustly.
func TestMNIST(t *testing.T) {
	data, model, net := mnist(t)
	threat := attack.Threat{Norm: "linf", Epsilon: 0.1}
	some, test := data.Train.Slice(0, 4096), data.Test.Slice(0, 500)
	recipe := model.Train.WithEpochs(3)
	if _, err := train.Run(context.Background(), net, some, nil, recipe, threat, 1, train.Options{}); err != nil {
		t.Fatal(err)
	}
	clean, attacked := accuracy(t, net, test, "", threat), accuracy(t, net, test, "fgsm", threat)
	robust := recipe
	robust.Phases = []train.Phase{{Method: "n-fgsm", Epochs: 3, EpsilonRampEpochs: 1}}
	if _, err := train.Run(context.Background(), net, some, nil, robust, threat, 1, train.Options{}); err != nil {
		t.Fatal(err)
	}
	recovered, fooled := accuracy(t, net, test, "", threat), accuracy(t, net, test, "pgd-10", threat)
	t.Logf("clean %.3f, attacked %.3f, retrained: clean %.3f, PGD-10 %.3f", clean, attacked, recovered, fooled)
	if clean < 0.88 || attacked > 0.75 || recovered < 0.9 || fooled < attacked+0.1 {
		t.Error("want a plain network that FGSM breaks, and a retrained one that withstands PGD better")
	}
}

// TestAttackOfConvolutions: what an image becomes does not depend on the batch
// it is in, with the real arithmetic too.
func TestAttackOfConvolutions(t *testing.T) {
	data, _, net := mnist(t)
	set := data.Test.Slice(0, 70)
	x := make([]float32, 70*784)
	set.Read(x, 0, 70)
	a, err := attack.Parse("pgd-3x2", attack.Threat{Norm: "linf", Epsilon: 0.1})
	if err != nil {
		t.Fatal(err)
	}
	var first []float32
	for _, batch := range []int{3, 64, 200} {
		m, err := graph.NewAttack(net, batch)
		if err != nil {
			t.Fatal(err)
		}
		adv, err := a.Perturb(context.Background(), m, x, set.Labels, 5)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = adv
		} else if !slices.Equal(first, adv) {
			t.Errorf("batch %d gives other images", batch)
		}
	}
}

// BenchmarkFast trains wong on all of MNIST by the recipe fast, and reports
// the accuracies on the test images.
func BenchmarkFast(b *testing.B) {
	data, model, net := mnist(b)
	recipe, err := zoo.LoadRecipe("fast")
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	for range b.N {
		r, err := train.Run(context.Background(), net, data.Train, data.Validation, recipe, model.Threat, 1, train.Options{Log: slog.Default()})
		if err != nil {
			b.Fatal(err)
		}
		b.Log(r)
	}
	b.StopTimer()
	for _, spec := range []string{"", "fgsm", "noise-20", "pgd-20", "pgd-40", "pgd-100"} {
		b.ReportMetric(accuracy(b, net, data.Test, spec, model.Threat), "accuracy-"+spec)
	}
}
