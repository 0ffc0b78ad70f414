package train

import (
	"context"
	"slices"
	"strings"
	"testing"
)

// A last phase that spoils the weights: the result is from before it.
func TestKeepsTheBestWeights(t *testing.T) {
	recipe := Recipe{ // 40 steps an epoch
		Batch: 10, Optimiser: Adam{LearningRate: 0.01}, Schedule: Schedule{Kind: "constant"},
		Phases: []Phase{
			{Method: "standard", Epochs: 1},
			{Method: "pgd", Epochs: 4, EpsilonRampEpochs: 1.5, Steps: 2, Alpha: 0.05},
			{Method: "pgd", Epochs: 1, Epsilon: 0.9, Steps: 2, Alpha: 0.9},
		},
		EMA: 0.9, KeepBest: true,
	}
	tr, err := newTrainer(toyNetwork(t), toy(405, 1), toy(60, 2), recipe, threat, 3, Options{})
	if err != nil {
		t.Fatal(err)
	}
	averages := map[int][]float32{}
	tr.opts.Progress = func(done, _ int) {
		averages[done] = slices.Clone(tr.now.ema)
		if looked := tr.best.step > 0; looked != (done > 120) { // progress is told before the look
			t.Errorf("at step %d weights are kept: %v; want them from 120 on, the first epoch's end after the ramp", done, looked)
		}
	}
	if _, err := tr.run(context.Background()); err != nil {
		t.Fatal(err)
	}
	step := tr.best.step
	if step < 120 || step > 200 || step%40 != 0 {
		t.Fatalf("the weights of step %d are kept: want the end of an epoch at full epsilon before the last phase", step)
	}
	if !slices.Equal(tr.net.Flat(), averages[step]) {
		t.Errorf("the result is not the moving average of step %d", step)
	}
}

// Looking changes nothing but what is kept.
func TestLookingForTheBestDoesNotChangeTheTraining(t *testing.T) {
	with, without := everything(), everything()
	without.KeepBest = false
	var weights [2][]float32
	for i, recipe := range []Recipe{with, without} {
		tr, err := newTrainer(toyNetwork(t), toy(405, 1), toy(60, 2), recipe, threat, 3, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tr.run(context.Background()); err != nil {
			t.Fatal(err)
		}
		weights[i] = tr.now.ema
	}
	if !slices.Equal(weights[0], weights[1]) {
		t.Error("the moving averages differ")
	}
}

func TestTrainingRefusesANormItDoesNotDefendIn(t *testing.T) {
	other := threat
	other.Norm = "l2"
	if _, err := newTrainer(toyNetwork(t), toy(405, 1), toy(60, 2), everything(), other, 3, Options{}); err == nil || !strings.Contains(err.Error(), "linf only") {
		t.Errorf("in l2: %v", err)
	}
}
