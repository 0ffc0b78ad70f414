// Package unknown says what exists when a name does not: the one form of
// error for an unknown dataset, network, recipe or attack.
package unknown

import (
	"fmt"
	"slices"
	"strings"
)

// Error is a name that is not among those that exist.
type Error struct {
	Kind string   // what was looked up, such as "attack"
	Got  string   // the name asked for
	Have []string // the names that exist, sorted
}

// Name returns an Error for a name of some kind.
func Name(kind, got string, have []string) error {
	have = slices.Clone(have)
	slices.Sort(have)
	return &Error{Kind: kind, Got: got, Have: have}
}

func (e *Error) Error() string {
	msg := fmt.Sprintf("unknown %s %q: have %s", e.Kind, e.Got, strings.Join(e.Have, ", "))
	if near := Nearest(e.Got, e.Have); near != "" {
		msg += fmt.Sprintf(" (did you mean %q?)", near)
	}
	return msg
}

// maxName bounds the quadratic distance below; no real name is as long.
const maxName = 64

// Nearest returns the name with the least edit distance to got, or "" where
// none is within half of its length.
func Nearest(got string, have []string) string {
	if len(got) > maxName {
		return ""
	}
	got = strings.ToLower(got)
	best, least := "", len(got)/2+1
	for _, name := range have {
		if len(name) > maxName {
			continue
		}
		if d := distance(got, strings.ToLower(name)); d < least {
			best, least = name, d
		}
	}
	return best
}

// distance counts the insertions, deletions, substitutions and swaps of
// neighbours that turn a into b (optimal string alignment).
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
