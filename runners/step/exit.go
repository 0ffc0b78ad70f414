package step

import (
	"context"
	"errors"

	"github.com/temper-ml/temper/models/unknown"
	"github.com/temper-ml/temper/signing/store"
)

// Exit codes of a step.
const (
	ExitDone        = 0
	ExitFailure     = 1
	ExitBadInput    = 2
	ExitRefused     = 3
	ExitUnavailable = 4
	ExitInterrupted = 5
)

// categorized is an error whose exit code is known.
type categorized struct {
	code int
	error
}

func (e *categorized) Unwrap() error { return e.error }

func categorize(code int, err error) error {
	if err == nil {
		return nil
	}
	return &categorized{code, err}
}

// BadInput marks an error that trying again cannot help: bad usage, or an
// input that is not what the step takes. Like the others it keeps nil as nil.
func BadInput(err error) error { return categorize(ExitBadInput, err) }

// Refused marks an artifact that verification refused.
func Refused(err error) error { return categorize(ExitRefused, err) }

// Unavailable marks the failure of something the step depends on, such as a
// registry: worth trying again later.
func Unavailable(err error) error { return categorize(ExitUnavailable, err) }

// Interrupted marks work that was stopped and kept a checkpoint to go on from.
func Interrupted(err error) error { return categorize(ExitInterrupted, err) }

// exitCode is the one place where an error becomes an exit code. A precise
// cause wins over the category that a caller put around it.
func exitCode(err error) int {
	var (
		known   *categorized
		down    *store.Unavailable
		refused *store.Refused
		absent  *store.NotFound
		name    *unknown.Error
	)
	marked := errors.As(err, &known)
	switch {
	case err == nil:
		return ExitDone
	case marked && known.code == ExitInterrupted:
		return ExitInterrupted
	case errors.Is(err, context.Canceled): // stopped, and nothing was kept
		return ExitFailure
	case errors.As(err, &down):
		return ExitUnavailable
	case errors.As(err, &refused):
		return ExitRefused
	case marked:
		return known.code
	case errors.As(err, &absent), errors.As(err, &name):
		return ExitBadInput
	}
	return ExitFailure
}
