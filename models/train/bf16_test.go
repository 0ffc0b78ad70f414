package train_test

import (
	"context"
	"math"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/train"
)

// PGD whose gradients are made of bfloat16 products, as training uses it, breaks as
// many images as PGD made of float32. What it makes is judged in float32: ball,
// box and label.
func TestBF16AttackIsAsStrong(t *testing.T) {
	if !kernel.HasBF16() {
		t.Skip("this processor, or TEMPER_KERNEL, has no bfloat16: nothing to compare")
	}
	data, model, net := mnist(t)
	threat := attack.Threat{Norm: "linf", Epsilon: 0.2}
	some, test := data.Train.Slice(0, 8192), data.Test.Slice(0, 2000)
	recipe := model.Train.WithEpochs(4)
	recipe.Phases = []train.Phase{{Method: "n-fgsm", Epochs: 4, EpsilonRampEpochs: 1}}
	if _, err := train.Run(context.Background(), net, some, nil, recipe, threat, 1, train.Options{}); err != nil {
		t.Fatal(err)
	}
	exact, err := graph.NewAttack(net, 250)
	if err != nil {
		t.Fatal(err)
	}
	fast, err := graph.NewFastAttack(net, 250)
	if err != nil {
		t.Fatal(err)
	}
	size, ball := net.Input.Size(), attack.Linf(threat.Epsilon)
	x, clean := make([]float32, 250*size), make([]float32, 250*size)
	robust := func(m attack.Model) float64 {
		loop := attack.Loop{Model: m, Ball: ball, Alpha: 0.025}
		right := 0
		for lo := 0; lo < test.Len(); lo += 250 {
			test.Read(clean, lo, lo+250)
			labels := test.Labels[lo : lo+250]
			loop.Start(ball, x, clean, 250, 7, uint64(lo))
			if err := loop.Ascend(x, clean, 250, 20, attack.CrossEntropy(labels, 10)); err != nil {
				t.Fatal(err)
			}
			if err := threat.Verify(x, clean, size); err != nil {
				t.Fatal(err)
			}
			logits, err := exact.Logits(x, 250)
			if err != nil {
				t.Fatal(err)
			}
			for i, y := range labels {
				if attack.Predict(logits[i*10:(i+1)*10]) == int(y) {
					right++
				}
			}
		}
		return float64(right) / float64(test.Len())
	}
	float32s, bfloat16s := robust(exact), robust(fast)
	t.Logf("accuracy under PGD-20: %.4f by float32, %.4f by bfloat16", float32s, bfloat16s)
	if d := bfloat16s - float32s; math.Abs(d) > 0.003 {
		t.Errorf("PGD-20 made of bfloat16 leaves %.4f, of float32 %.4f: more than 0.3 points apart", bfloat16s, float32s)
	}
	if float32s < 0.4 || float32s > 0.97 {
		t.Errorf("accuracy under PGD-20 is %.4f: too near an end to compare", float32s)
	}
}
