// Package sign signs models and attests to them as cosign does. It links every
// way to load a key, a Kubernetes client among them; package verify does not.
package sign

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	cosignature "github.com/sigstore/cosign/v2/pkg/signature"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
)

// Names of the files that GenerateKeyPair writes, those of cosign.
const (
	PrivateKeyFile = "cosign.key"
	PublicKeyFile  = "cosign.pub"
)

// PasswordVariable is the environment variable that holds a private key's
// password, as for cosign.
const PasswordVariable = "COSIGN_PASSWORD"

// Password asks for a private key's password; confirm says that it is for a
// new key. EnvironmentPassword is one.
type Password func(confirm bool) ([]byte, error)

// EnvironmentPassword takes the password from COSIGN_PASSWORD. It may be
// empty, but must be set: an empty password is a decision.
func EnvironmentPassword(bool) ([]byte, error) {
	password, ok := os.LookupEnv(PasswordVariable)
	if !ok {
		return nil, fmt.Errorf("the private key's password is unknown: set %s (to nothing for a key without one)", PasswordVariable)
	}
	return []byte(password), nil
}

// GenerateKeyPair writes a new key pair, dir/cosign.key and dir/cosign.pub.
// It never replaces a key: what it signed could not be signed again.
func GenerateKeyPair(dir string, password Password) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("key pair: %w", err)
	}
	defer root.Close()
	for _, name := range []string{PrivateKeyFile, PublicKeyFile} {
		if _, err := root.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("key pair: %s exists: keys are never replaced, so name another folder", filepath.Join(dir, name))
		}
	}
	keys, err := cosign.GenerateKeyPair(cosign.PassFunc(password))
	if err != nil {
		return fmt.Errorf("key pair: %w", err)
	}
	if err := create(root, PublicKeyFile, keys.PublicBytes, 0o644); err != nil {
		return fmt.Errorf("key pair: %w", err)
	}
	if err := create(root, PrivateKeyFile, keys.PrivateBytes, 0o600); err != nil {
		root.Remove(PublicKeyFile)
		return fmt.Errorf("key pair: %w", err)
	}
	return nil
}

// create writes a whole file that does not exist yet.
func create(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	part := name + ".part"
	f, err := root.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer root.Remove(part)
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return root.Link(part, name) // fails where name exists, unlike a rename
}

// Key signs.
type Key struct {
	signer signature.SignerVerifier
	public []byte
}

// Unavailable says that the service that keeps a private key does not answer:
// trying again later may succeed.
type Unavailable struct {
	Key string // reference
	Err error
}

func (e *Unavailable) Error() string {
	return fmt.Sprintf("private key %s is unavailable: %v", e.Key, e.Err)
}
func (e *Unavailable) Unwrap() error { return e.Err }

// outages are how an outage reads where only words are left of it: a KMS's
// plugin is a program of its own, and answers in words.
var outages = []string{
	"connection refused", "connection reset", "no such host", "no route to host", "network is unreachable",
	"timeout", "timed out", "deadline exceeded", "unable to handle the request", "too many requests", "service unavailable",
}

// unreachable tells an outage of a key's service from a key that is wrong.
func unreachable(ref string, err error) bool {
	if !strings.Contains(ref, "://") || strings.HasPrefix(ref, "env://") {
		return false // here, or nowhere
	}
	var network net.Error
	text := strings.ToLower(err.Error())
	return errors.As(err, &network) || slices.ContainsFunc(outages, func(words string) bool { return strings.Contains(text, words) })
}

// LoadKey loads a private key: a file's path, env://VARIABLE,
// k8s://NAMESPACE/SECRET, or the reference of a key in a KMS, such as
// awskms://..., through sigstore's plugin for it (a program
// sigstore-kms-awskms on the path). The password is asked for where the key
// is a file or in a variable. Where the key's service does not answer the error
// is an *Unavailable.
func LoadKey(ctx context.Context, ref string, password Password) (*Key, error) {
	if strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://") {
		return nil, errors.New("a private key is not read from a URL: name a file, env://VARIABLE, k8s://NAMESPACE/SECRET or a KMS")
	}
	signer, err := cosignature.SignerVerifierFromKeyRef(ctx, ref, cosign.PassFunc(password), nil)
	var k *Key
	if err == nil {
		k, err = NewKey(signer) // a KMS is asked only now
	}
	switch {
	case err == nil:
		return k, nil
	case unreachable(ref, err):
		return nil, &Unavailable{ref, err}
	case strings.Contains(err.Error(), "decrypt"):
		return nil, fmt.Errorf("private key %s: wrong password: set %s", ref, PasswordVariable)
	}
	return nil, fmt.Errorf("private key %s: %w", ref, err)
}

// NewKey is a key that is in memory or in a device of its own.
func NewKey(signer signature.SignerVerifier) (*Key, error) {
	public, err := signer.PublicKey()
	if err != nil {
		return nil, err
	}
	pem, err := cryptoutils.MarshalPublicKeyToPEM(public)
	if err != nil {
		return nil, err
	}
	return &Key{signer: signer, public: pem}, nil
}

// PublicKey is the public half, as PEM.
func (k *Key) PublicKey() []byte { return k.public }
