package verify

import (
	"context"
	"errors"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/temper-ml/temper/signing/store"
)

// Modelcar finds the modelcar of a verified ModelPack: an image that refers to
// it, that the policy accepts by itself, and whose signed figures, where the
// policy asks for them, are about the same model. Where there is none, or none that is accepted, the error is a
// *store.Refused.
func Modelcar(ctx context.Context, pack *Verified, p Policy) (*Verified, error) {
	r, err := store.Open(ctx, pack.Reference)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	referrers, err := r.Referrers(ctx)
	if err != nil {
		return nil, err
	}
	var reasons []string
	for _, digest := range referrers {
		at, err := r.At(digest)
		if err != nil {
			return nil, err
		}
		m, _, err := at.Manifest(ctx)
		if err != nil {
			return nil, err
		}
		if m.Config.MediaType != ocispec.MediaTypeImageConfig || m.Subject == nil || m.Subject.Digest.String() != pack.Digest {
			continue
		}
		car, err := Verify(ctx, at.String(), p)
		var refused *store.Refused
		switch {
		case errors.As(err, &refused):
			reasons = append(reasons, refused.Error())
		case err != nil:
			return nil, err
		case p.Robustness != nil && (pack.Robustness == nil || car.Robustness.ModelDigest != pack.Robustness.ModelDigest):
			reasons = append(reasons, fmt.Sprintf("%s: its signed figures are about another model", at))
		default:
			return car, nil
		}
	}
	return nil, refuse(r, "it has no modelcar that is signed as it is (temper pack makes it, temper sign signs both): %s", summary(reasons))
}
