package statement

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestNewAndParse(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	data, err := New("tiny", digest, TestResultType, &TestResult{Result: Passed, Configuration: []Resource{}, PassedTests: []string{"clean"}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(data)
	if err != nil || s.Type != Type || s.Subject[0].Digest["sha256"] != digest[len("sha256:"):] {
		t.Fatalf("%+v, %v", s, err)
	}
	if r, err := ParseTestResult(s.Predicate); err != nil || r.PassedTests[0] != "clean" {
		t.Errorf("%+v, %v", r, err)
	}
	for _, digest := range []string{"", "sha256:", "sha256:../../x", strings.Repeat("a", 64), "sha512:" + strings.Repeat("a", 64)} {
		if _, err := New("tiny", digest, TestResultType, &TestResult{Result: Passed}); err == nil {
			t.Errorf("a statement about %q was made", digest)
		}
	}
	if _, err := New("tiny", digest, RobustnessType, &Robustness{}); err == nil {
		t.Error("empty figures were stated")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"_type":"` + Type + `","subject":[{"digest":{"sha256":"aa"}}],"predicateType":"x","predicate":{"result":"PASSED"}}`))
	f.Add([]byte(`{"samples":1,"confidence":0.95,"attacks":[{"name":"fgsm"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := Parse(data); err == nil {
			if again, err := json.Marshal(s); err != nil {
				t.Fatalf("a statement that cannot be written: %v", err)
			} else if _, err := Parse(again); err != nil {
				t.Fatalf("%s: %v", again, err)
			}
			data = s.Predicate
		}
		if r, err := ParseTestResult(data); err == nil && r.Result == Passed && len(r.FailedTests) > 0 {
			t.Fatal("passed with failed tests")
		}
		if r, err := ParseRobustness(data); err == nil && !(r.Robust.LowerBound >= 0 && r.Robust.LowerBound <= r.Clean.Accuracy) {
			t.Fatalf("impossible figures: %+v", r)
		}
	})
}
