package serve

import (
	"context"
	"log/slog"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// Refusals logged in a second, and at once: a flood of bad requests must not
// become a flood of log lines.
const (
	logRate  = 10
	logBurst = 50
)

// maxLogged cuts what a client chose, in bytes.
const maxLogged = 200

// limitedLog writes at most logRate lines a second and says how many it left
// out.
type limitedLog struct {
	log     *slog.Logger
	limit   *rate.Limiter
	skipped atomic.Int64
}

func newLimitedLog(log *slog.Logger) *limitedLog {
	return &limitedLog{log: log, limit: rate.NewLimiter(logRate, logBurst)}
}

func (l *limitedLog) warn(message string, attrs ...slog.Attr) {
	if !l.limit.Allow() {
		l.skipped.Add(1)
		return
	}
	if n := l.skipped.Swap(0); n > 0 {
		attrs = append(attrs, slog.Int64("lines_left_out", n))
	}
	l.log.LogAttrs(context.Background(), slog.LevelWarn, message, attrs...)
}

// Write takes the lines of http.Server's own log.
func (l *limitedLog) Write(line []byte) (int, error) {
	l.warn("http server", slog.String("error", cut(string(line))))
	return len(line), nil
}

func cut(s string) string {
	if len(s) > maxLogged {
		return s[:maxLogged] + "..."
	}
	return s
}
