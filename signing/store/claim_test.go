package store

import (
	"errors"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// TestCase39ClaimsAtOnce: of several that claim a tag one is told that it has
// it, and the tag is that one's, in our registry and in one that keeps no
// conditions and takes its time.
func TestCase39ClaimsAtOnce(t *testing.T) {
	const claims = 4
	ours, err := Start(t.Context(), t.TempDir()+"/layout", "")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	plain := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, "/manifests/claimed") {
			time.Sleep(rand.N(200 * time.Millisecond))
		}
		plain.ServeHTTP(w, req)
	}))
	defer slow.Close()
	for name, host := range map[string]string{"conditions": ours.Addr(), "no conditions": strings.TrimPrefix(slow.URL, "http://")} {
		t.Run(name, func(t *testing.T) {
			at, err := Open(t.Context(), host+"/tiny:claimed")
			if err != nil {
				t.Fatal(err)
			}
			defer at.Close()
			untagged, err := at.At("")
			if err != nil {
				t.Fatal(err)
			}
			var digests [claims]string
			for i := range claims {
				if digests[i], err = untagged.Push(t.Context(), &Artifact{Type: "application/vnd.temper.test", Files: []File{{Name: "n", MediaType: "text/plain", Data: []byte{byte(i)}}}}); err != nil {
					t.Fatal(err)
				}
			}
			var group sync.WaitGroup
			var won, lost [claims]bool // neither: it took too long and does not know
			for i := range claims {
				group.Go(func() {
					err := at.Claim(t.Context(), digests[i])
					var taken *Exists
					var late *Unavailable
					won[i], lost[i] = err == nil, errors.As(err, &taken)
					if err != nil && !lost[i] && !errors.As(err, &late) {
						t.Error(err)
					}
				})
			}
			group.Wait()
			has, err := at.Resolve(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for i, digest := range digests {
				if won[i] && digest != has.Digest() || lost[i] && digest == has.Digest() {
					t.Errorf("claim %d was told %v, and the tag is %s of %s", i, won[i], has.Digest(), digests)
				}
			}
			// Who has it may say so again.
			if err := at.Claim(t.Context(), has.Digest()); err != nil {
				t.Error(err)
			}
		})
	}
}
