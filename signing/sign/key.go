// Package sign signs models and attests to them as cosign does. It links every
// way to load a key, a Kubernetes client among them; package verify does not.
package sign

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// LoadKey loads a private key: a file's path, env://VARIABLE,
// k8s://NAMESPACE/SECRET, or the reference of a key in a KMS, such as
// awskms://..., through sigstore's plugin for it (a program
// sigstore-kms-awskms on the path). The password is asked for where the key
// is a file or in a variable.
func LoadKey(ctx context.Context, ref string, password Password) (*Key, error) {
	if strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://") {
		return nil, errors.New("a private key is not read from a URL: name a file, env://VARIABLE, k8s://NAMESPACE/SECRET or a KMS")
	}
	signer, err := cosignature.SignerVerifierFromKeyRef(ctx, ref, cosign.PassFunc(password), nil)
	if err != nil {
		if strings.Contains(err.Error(), "decrypt") {
			return nil, fmt.Errorf("private key %s: wrong password: set %s", ref, PasswordVariable)
		}
		return nil, fmt.Errorf("private key %s: %w", ref, err)
	}
	k, err := NewKey(signer)
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", ref, err)
	}
	return k, nil
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
