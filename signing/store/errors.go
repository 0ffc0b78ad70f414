package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"syscall"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Unavailable says that a registry does not answer, or answers that it cannot
// serve now: trying again later may succeed.
type Unavailable struct {
	Address string // the registry's host and port, or oci:DIR
	Err     error
}

func (e *Unavailable) Error() string {
	return fmt.Sprintf("registry %s is unavailable: %v", e.Address, e.Err)
}
func (e *Unavailable) Unwrap() error { return e.Err }

// NotFound says that a registry has no such repository, tag or digest.
type NotFound struct {
	Reference string
}

func (e *NotFound) Error() string {
	return fmt.Sprintf("%s does not exist: check the repository, tag or digest", e.Reference)
}

// Exists says that a tag that was to be claimed is taken.
type Exists struct {
	Reference string
	Digest    string // of what has the tag
}

func (e *Exists) Error() string { return fmt.Sprintf("%s exists: it is %s", e.Reference, e.Digest) }

// Refused says that content is not what its reference promised, or exceeds a
// limit: it must not be used, and trying again does not help.
type Refused struct {
	Reference string
	Err       error
}

func (e *Refused) Error() string { return fmt.Sprintf("%s is refused: %v", e.Reference, e.Err) }
func (e *Refused) Unwrap() error { return e.Err }

func refuse(ref, format string, args ...any) error {
	return &Refused{Reference: ref, Err: fmt.Errorf(format, args...)}
}

// Explain gives an error of a request with Options its category: Unavailable,
// NotFound or Refused where it is one of these. It keeps nil as nil.
func (r *Reference) Explain(err error) error {
	var (
		status   *transport.Error
		known    *Refused
		absent   *NotFound
		down     *Unavailable
		tooLarge *tooLargeError
	)
	switch {
	case err == nil, errors.As(err, &known), errors.As(err, &absent), errors.As(err, &down):
		return err
	case errors.As(err, &tooLarge):
		return &Refused{Reference: r.String(), Err: tooLarge}
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", r, err)
	case errors.As(err, &status):
		switch code := status.StatusCode; {
		case code == http.StatusNotFound:
			return &NotFound{Reference: r.String()}
		case code == http.StatusInsufficientStorage:
			return fmt.Errorf("%s: no space left for what is pushed: %w", r, plain(status))
		case code == http.StatusUnauthorized, code == http.StatusForbidden:
			return fmt.Errorf("%s: access denied (for a registry, run docker login %s): %w", r, r.repository.RegistryStr(), plain(status))
		case code >= 500, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout:
			return &Unavailable{Address: r.Address(), Err: plain(status)}
		}
		return &answered{message: fmt.Sprintf("%s: %v", r, plain(status)), status: status}
	case interrupted(err):
		cause := plain(err)
		if errors.Is(err, context.DeadlineExceeded) && !errors.Is(cause, context.DeadlineExceeded) {
			cause = context.DeadlineExceeded // of HTTPS and HTTP, the try that did not fail by itself
		}
		return &Unavailable{Address: r.Address(), Err: cause}
	}
	return fmt.Errorf("%s: %w", r, plain(err))
}

// answered is a registry's refusal of a request, in plain words.
type answered struct {
	message string
	status  *transport.Error
}

func (e *answered) Error() string { return e.message }
func (e *answered) Unwrap() error { return e.status }

// interrupted tells a failure of the connection, a deadline's end included,
// from a failure of content.
func interrupted(err error) bool {
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, errStalled) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed)
}

// plain drops what may hold a secret, a URL's credentials and query, from the
// errors of net/http and of the registry client.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	var status *transport.Error
	if errors.As(err, &status) {
		if len(status.Errors) == 0 {
			return fmt.Errorf("%d %s", status.StatusCode, http.StatusText(status.StatusCode))
		}
		d := status.Errors[0]
		return fmt.Errorf("%d %s: %.500s", status.StatusCode, d.Code, d.Message)
	}
	return err
}
