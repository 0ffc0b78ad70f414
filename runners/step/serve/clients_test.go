package serve

import (
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestTritonClient asks a server by Triton's own Python client, over HTTP (JSON
// and binary) and gRPC.
func TestTritonClient(t *testing.T) {
	python := os.Getenv("TEMPER_TEST_CLIENTS")
	if python == "" {
		t.Skip("run `go tool task clients`, and set TEMPER_TEST_CLIENTS=$PWD/.task/clients/bin/python")
	}
	s, _, grpc := withGRPC(t, model(t, wong, 1))
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), python, "testdata/clients/triton.py", "digits", u.Host, grpc).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "give the same answers") {
		t.Errorf("%v\n%s", err, out)
	}
}
