package step

import (
	"fmt"
	"math"
	"strconv"

	"github.com/spf13/pflag"
)

// number is a flag whose value must lie between two bounds, both included.
// pflag's own floats take NaN and infinity, which no comparison downstream
// would stop.
type number[T int | float64] struct {
	value       *T
	least, most T
	parse       func(string) (T, error)
	kind        string
}

func (n *number[T]) String() string {
	if n.value == nil { // pflag asks a zero value for its default
		return ""
	}
	return fmt.Sprint(*n.value)
}

func (n *number[T]) Type() string { return n.kind }

func (n *number[T]) Set(text string) error {
	v, err := n.parse(text)
	if err != nil || !(v >= n.least && v <= n.most) { // NaN fails both comparisons
		if float64(n.most) == math.MaxFloat64 || float64(n.most) == math.MaxInt {
			return fmt.Errorf("must be a number of at least %v", n.least)
		}
		return fmt.Errorf("must be a number from %v to %v", n.least, n.most)
	}
	*n.value = v
	return nil
}

// Float defines a flag for a finite number from least to most.
func Float(flags *pflag.FlagSet, p *float64, name string, value, least, most float64, usage string) {
	*p = value
	flags.Var(&number[float64]{p, least, most, func(s string) (float64, error) { return strconv.ParseFloat(s, 64) }, "number"}, name, usage)
}

// Fraction defines a flag for a number from 0 to 1.
func Fraction(flags *pflag.FlagSet, p *float64, name string, value float64, usage string) {
	Float(flags, p, name, value, 0, 1, usage)
}

// Int defines a flag for a whole number from least to most.
func Int(flags *pflag.FlagSet, p *int, name string, value, least, most int, usage string) {
	*p = value
	flags.Var(&number[int]{p, least, most, strconv.Atoi, "count"}, name, usage)
}
