package report

import (
	"strings"
	"testing"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/evaluate"
	"github.com/temper-ml/temper/models/gate"
	"github.com/temper-ml/temper/models/nn"
)

func TestEvaluationPage(t *testing.T) {
	r := &evaluate.Report{
		Network: "wong", Dataset: "mnist", DatasetDigest: "sha256:data", ModelDigest: "sha256:model",
		Threat: attack.Threat{Norm: "linf", Epsilon: 0.3}, Seed: 7, Samples: 10, Confidence: 0.95,
		CleanCorrect: 9, CleanAccuracy: 0.9, CleanAccuracyLowerBound: 0.6058,
		RobustCorrect: 5, RobustAccuracy: 0.5, RobustAccuracyLowerBound: 0.2224,
		Attacks: []evaluate.Attack{
			{Name: "fgsm", Correct: 6, Accuracy: 0.6, AccuracyLowerBound: 0.3035},
			{Name: "fgsm", MadeOn: "sha256:0123456789abcdef", Correct: 8, Accuracy: 0.8, AccuracyLowerBound: 0.4931},
		},
		Classes:   []evaluate.Class{{Name: "cat"}, {Name: "dog"}},
		Confusion: evaluate.Confusion{Clean: [][]int{{5, 0}, {1, 4}}, Adversarial: [][]int{{3, 2}, {3, 2}}},
		Curve:     []evaluate.Series{{Attack: "fgsm", Points: []evaluate.Point{{Epsilon: 0, Accuracy: 0.9}, {Epsilon: 0.3, Accuracy: 0.6}}}},
		Shape:     nn.Shape{Height: 1, Width: 1, Channels: 3},
		Examples:  []evaluate.Example{{Label: 0, Prediction: 0, AdversarialPrediction: 1, Clean: []byte{1, 2, 3}, Adversarial: []byte{4, 5, 6}}},
	}
	page := render(t, Evaluation(r, &gate.Verdict{Reasons: []gate.Reason{{Rule: "min_robust_accuracy", Text: "too low"}}}))
	for _, want := range []string{"wong on mnist", "90.00%", "at least 22.24%", "fgsm, made on sha256:0123456789ab…", "worst case", "cat", "dog", "threat model: ε = 0.3", "min_robust_accuracy", "too low", "sha256:model", "fail"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}
