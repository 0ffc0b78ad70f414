package verify

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/sigstore/cosign/v2/pkg/oci/static"

	"github.com/temper-ml/temper/signing/store"
)

// fuzzKey is a public key whose private key nobody has kept.
const fuzzKey = `-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----
`

// FuzzForeign: whatever a registry has beside an artifact, as a signature's
// payload, as its base64 or as a statement's envelope, is nobody's signature,
// and no panic.
func FuzzForeign(f *testing.F) {
	f.Add([]byte(`{"critical":{"identity":{"docker-reference":"ghcr.io/x/y"},"image":{"docker-manifest-digest":"sha256:00"},"type":"cosign container image signature"},"optional":null}`), "MEUCIQ==")
	f.Add([]byte(`{"payloadType":"application/vnd.in-toto+json","payload":"e30=","signatures":[{"keyid":"","sig":"MEUCIQ=="}]}`), "")
	f.Add([]byte("\x00"), "\xff")
	f.Add([]byte(strings.Repeat(`{"payload":`, 1000)), strings.Repeat("A", 1000))
	policy := Policy{Keys: []Key{{Name: "a", PEM: []byte(fuzzKey)}}}
	keys, err := policy.load()
	if err != nil {
		f.Fatal(err)
	}
	at, err := store.Open(context.Background(), "oci:"+f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { at.Close() })
	f.Fuzz(func(t *testing.T, data []byte, signature string) {
		sum := sha256.Sum256(data)
		c := &check{policy: &policy, keys: keys, at: at, digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}}
		l := layer{data: data, annotations: map[string]string{static.SignatureAnnotationKey: signature}}
		if key, err := c.signer(t.Context(), l); err == nil {
			t.Errorf("signed by %s", key)
		}
		if s, _, by, err := c.statement(t.Context(), l); err == nil {
			t.Errorf("%+v by %v", s, by)
		}
	})
}
