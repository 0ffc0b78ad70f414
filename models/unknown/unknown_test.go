package unknown

import "testing"

func TestNearest(t *testing.T) {
	have := []string{"fgsm", "pgd-20", "noise"}
	for got, want := range map[string]string{"fgms": "fgsm", "FGSM": "fgsm", "pgd20": "pgd-20", "nois": "noise", "zzzz": "", "": ""} {
		if near := Nearest(got, have); near != want {
			t.Errorf("Nearest(%q) = %q, want %q", got, near, want)
		}
	}
}

func TestErrorListsWhatExists(t *testing.T) {
	const want = `unknown attack "fgms": have fgsm, noise, pgd-20 (did you mean "fgsm"?)`
	if got := Name("attack", "fgms", []string{"pgd-20", "fgsm", "noise"}).Error(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
