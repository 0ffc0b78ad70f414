package lint

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// want marks a line on which a rule has to find something.
var want = regexp.MustCompile(`# want: ([a-z]+)`)

// TestFixtures holds every rule to files that it must refuse, with the line,
// and to nothing more: each folder of testdata is a case.
func TestFixtures(t *testing.T) {
	files, err := filepath.Glob("testdata/*_fail/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	seen := map[string]bool{}
	for _, file := range files {
		t.Run(strings.TrimPrefix(file, "testdata/"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			expected := map[string]bool{}
			for i, line := range strings.Split(string(data), "\n") {
				for _, m := range want.FindAllStringSubmatch(line, -1) {
					expected[fmt.Sprintf("%d: %s", i+1, m[1])] = true
					seen[m[1]] = true
				}
			}
			if len(expected) == 0 {
				t.Fatal("the fixture expects nothing")
			}
			docs, findings := Parse(file, data)
			found := map[string]bool{}
			for _, f := range append(findings, Check(docs)...) {
				if f.File != file || f.Line == 0 && f.Rule != "decode" {
					t.Errorf("%v: without file and line", f)
				}
				found[fmt.Sprintf("%d: %s", f.Line, f.Rule)] = true
			}
			for f := range expected {
				if !found[f] {
					t.Errorf("not found: %s; found %q", f, slices.Sorted(maps.Keys(found)))
				}
			}
			for f := range found {
				if !expected[f] {
					t.Errorf("found, and not expected: %s", f)
				}
			}
		})
	}
	for _, rule := range []string{"decode", "shell", "container", "pod", "rights", "keys", "signatures", "parameters"} {
		if !seen[rule] {
			t.Errorf("rule %s has no fixture that it must refuse", rule)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*_fail/*.yaml")
	for _, file := range files {
		data, _ := os.ReadFile(file)
		f.Add(data)
	}
	f.Add([]byte("kind: Role\nrules: 1\n---\n[]\n---\n&a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		docs, _ := Parse("f", data)
		Check(docs)
	})
}
