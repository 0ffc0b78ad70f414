package evaluate

import (
	"fmt"
	"math"
	"strconv"

	"github.com/sjwhitworth/golearn/base"
	"github.com/sjwhitworth/golearn/evaluation"
)

// ConfusionMatrix counts examples by label (row) and prediction (column).
func ConfusionMatrix(labels, predictions []uint8, classes int) ([][]int, error) {
	counts, err := golearnMatrix(labels, predictions, classes)
	if err != nil {
		return nil, err
	}
	return toTable(counts, classes), nil
}

func toTable(counts evaluation.ConfusionMatrix, classes int) [][]int {
	m := make([][]int, classes)
	for i := range m {
		m[i] = make([]int, classes)
		for j := range m[i] {
			m[i][j] = counts[strconv.Itoa(i)][strconv.Itoa(j)]
		}
	}
	return m
}

// golearnMatrix is golearn's confusion matrix. Classes go by their numbers, so
// that no name of a class can confuse two of them.
func golearnMatrix(labels, predictions []uint8, classes int) (evaluation.ConfusionMatrix, error) {
	if len(labels) != len(predictions) {
		return nil, fmt.Errorf("%d labels and %d predictions", len(labels), len(predictions))
	}
	truth, err := classColumn(labels, classes)
	if err != nil {
		return nil, fmt.Errorf("labels: %w", err)
	}
	guess, err := classColumn(predictions, classes)
	if err != nil {
		return nil, fmt.Errorf("predictions: %w", err)
	}
	return evaluation.GetConfusionMatrix(truth, guess)
}

// classColumn is a golearn data grid whose only attribute is the class.
func classColumn(values []uint8, classes int) (*base.DenseInstances, error) {
	class := base.NewCategoricalAttribute()
	class.SetName("class")
	codes := make([][]byte, classes)
	for i := range codes {
		codes[i] = class.GetSysValFromString(strconv.Itoa(i))
	}
	grid := base.NewDenseInstances()
	column := grid.AddAttribute(class)
	if err := grid.AddClassAttribute(class); err != nil {
		return nil, err
	}
	if err := grid.Extend(len(values)); err != nil {
		return nil, err
	}
	for row, v := range values {
		if int(v) >= classes {
			return nil, fmt.Errorf("example %d is of class %d: there are %d", row, v, classes)
		}
		grid.Set(column, row, codes[v])
	}
	return grid, nil
}

// metrics are golearn's for each class; golearn divides by zero where a class
// was never predicted, which counts as 0 here.
func metrics(m evaluation.ConfusionMatrix, classes int) []Metrics {
	defined := func(v float64) float64 {
		if math.IsNaN(v) {
			return 0
		}
		return v
	}
	all := make([]Metrics, classes)
	for i := range all {
		c := strconv.Itoa(i)
		all[i] = Metrics{
			Precision: defined(evaluation.GetPrecision(c, m)),
			Recall:    defined(evaluation.GetRecall(c, m)),
			F1:        defined(evaluation.GetF1Score(c, m)),
		}
	}
	return all
}
