package sign

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	cremote "github.com/sigstore/cosign/v2/pkg/cosign/remote"
	"github.com/sigstore/cosign/v2/pkg/oci"
	"github.com/sigstore/cosign/v2/pkg/oci/mutate"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	"github.com/sigstore/cosign/v2/pkg/types"
	sigdsse "github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/options"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/temper-ml/temper/signing/statement"
	"github.com/temper-ml/temper/signing/store"
)

// Sign signs the artifact that ref names and returns ref with its digest.
// The signature is for the repository's identity (see store.Reference); it is
// stored as cosign does, under the tag sha256-....sig, and not logged.
// Signing again leaves one signature by this key.
func (k *Key) Sign(ctx context.Context, ref string) (string, error) {
	r, digest, err := k.open(ctx, ref)
	if err != nil {
		return "", err
	}
	defer r.Close()
	message, err := payload.Cosign{Image: digest, ClaimedIdentity: r.Identity()}.MarshalJSON()
	if err != nil {
		return "", err
	}
	signed, err := k.signer.SignMessage(bytes.NewReader(message), options.WithContext(ctx))
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", r, err)
	}
	sig, err := static.NewSignature(message, base64.StdEncoding.EncodeToString(signed))
	if err != nil {
		return "", err
	}
	known := cremote.NewDupeDetector(k.signer)
	err = attach(ctx, r, digest, "sig",
		func(e oci.SignedEntity) (oci.SignedEntity, bool, error) {
			old, err := e.Signatures()
			if err != nil {
				return nil, false, err
			}
			if found, err := known.Find(old, sig); err != nil || found != nil {
				return nil, true, err
			}
			e, err = mutate.AttachSignatureToEntity(e, sig)
			return e, false, err
		}, ociremote.WriteSignatures)
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return r.String(), nil
}

// Attest signs a statement about the artifact that ref names, with a predicate
// such as statement.Robustness, and returns ref with its digest. It takes the
// place of this key's earlier statement of the same type; the same statement
// again changes nothing.
func (k *Key) Attest(ctx context.Context, ref, predicateType string, predicate any) (string, error) {
	r, digest, err := k.open(ctx, ref)
	if err != nil {
		return "", err
	}
	defer r.Close()
	message, err := statement.New(r.Identity(), digest.DigestStr(), predicateType, predicate)
	if err != nil {
		return "", err
	}
	envelope, err := sigdsse.WrapSigner(k.signer, types.IntotoPayloadType).SignMessage(bytes.NewReader(message), options.WithContext(ctx))
	if err != nil {
		return "", fmt.Errorf("attest %s: %w", r, err)
	}
	att, err := static.NewAttestation(envelope,
		static.WithLayerMediaType(types.DssePayloadType),
		static.WithAnnotations(map[string]string{"predicateType": predicateType}))
	if err != nil {
		return "", err
	}
	err = attach(ctx, r, digest, "att",
		func(e oci.SignedEntity) (oci.SignedEntity, bool, error) {
			old, err := e.Attestations()
			if err != nil {
				return nil, false, err
			}
			own := &ownStatements{key: k, predicateType: predicateType}
			kept, same, err := own.split(ctx, old, message)
			if err != nil || same {
				return nil, same, err
			}
			e, err = mutate.AttachAttestationToEntity(e, att, mutate.WithReplaceOp(&replacement{kept}))
			return e, false, err
		}, ociremote.WriteAttestations)
	if err != nil {
		return "", fmt.Errorf("attest: %w", err)
	}
	return r.String(), nil
}

func (k *Key) open(ctx context.Context, ref string) (*store.Reference, name.Digest, error) {
	r, err := store.Open(ctx, ref)
	if err != nil {
		return nil, name.Digest{}, err
	}
	if err := r.Pin(ctx); err != nil {
		r.Close()
		return nil, name.Digest{}, err
	}
	return r, r.Name().(name.Digest), nil
}

// maxTries bounds how often signers that write at the same moment try again:
// the number of signers, and one read to see that it is done.
const maxTries = 10

// attach adds to the list of signatures ("sig") or attestations ("att") of an
// artifact, unless edit finds it there, until a read shows it there.
func attach(ctx context.Context, r *store.Reference, digest name.Digest, suffix string,
	edit func(oci.SignedEntity) (changed oci.SignedEntity, done bool, err error),
	write func(name.Repository, oci.SignedEntity, ...ociremote.Option) error) error {
	list, err := r.At(strings.Replace(digest.DigestStr(), ":", "-", 1) + "." + suffix)
	if err != nil {
		return err
	}
	for range maxTries {
		before := ""
		at, err := list.Resolve(ctx)
		var absent *store.NotFound
		if err == nil {
			before = at.Digest()
		} else if !errors.As(err, &absent) {
			return err
		}
		e, err := ociremote.SignedEntity(digest, ociremote.WithRemoteOptions(r.Options(ctx)...))
		if err != nil {
			return r.Explain(err)
		}
		changed, done, err := edit(e)
		if err != nil || done {
			return r.Explain(err)
		}
		expecting := list.Expecting(before)
		if err := write(digest.Repository, changed, ociremote.WithRemoteOptions(expecting.Options(ctx)...)); err != nil && !store.IsChanged(err) {
			return r.Explain(err)
		}
	}
	return fmt.Errorf("%s: other signers keep replacing the list of signatures: try again", r)
}

// ownStatements finds what a key attested to before.
type ownStatements struct {
	key           *Key
	predicateType string
}

// split returns the attestations to keep, and whether message is among the
// key's own.
func (o *ownStatements) split(ctx context.Context, old oci.Signatures, message []byte) (kept []oci.Signature, same bool, err error) {
	all, err := old.Get()
	if err != nil {
		return nil, false, err
	}
	verifier, err := dsse.NewEnvelopeVerifier(&sigdsse.VerifierAdapter{SignatureVerifier: o.key.signer})
	if err != nil {
		return nil, false, err
	}
	for _, a := range all {
		data, err := a.Payload()
		if err != nil {
			return nil, false, err
		}
		var envelope dsse.Envelope
		var s struct{ PredicateType string }
		own := json.Unmarshal(data, &envelope) == nil
		if own {
			_, err := verifier.Verify(ctx, &envelope)
			own = err == nil
		}
		if own {
			body, err := envelope.DecodeB64Payload()
			if err == nil && bytes.Equal(body, message) {
				return nil, true, nil
			}
			own = err == nil && json.Unmarshal(body, &s) == nil && s.PredicateType == o.predicateType
		}
		if !own {
			kept = append(kept, a)
		}
	}
	return kept, false, nil
}

// replacement is a list of attestations with one added at its end.
type replacement struct{ kept []oci.Signature }

func (r *replacement) Replace(base oci.Signatures, added oci.Signature) (oci.Signatures, error) {
	return &attestations{Signatures: base, list: append(r.kept, added)}, nil
}

type attestations struct {
	oci.Signatures
	list []oci.Signature
}

func (a *attestations) Get() ([]oci.Signature, error) { return a.list, nil }
