package step

import (
	"context"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"github.com/schollz/progressbar/v3"
)

// narration is standard error: log lines without secrets, and at times a
// progress bar below them.
type narration struct {
	w    io.Writer
	hide *redactor
	mu   sync.Mutex
	bar  *progressbar.ProgressBar
}

func (n *narration) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.bar != nil && !n.bar.IsFinished() {
		n.bar.Clear()
	}
	if _, err := io.WriteString(n.w, n.hide.Redact(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (n *narration) newBar(total int) *progressbar.ProgressBar {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bar = progressbar.NewOptions(total,
		progressbar.OptionSetWriter(n.w),
		progressbar.OptionThrottle(progressEvery),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionSetElapsedTime(true),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionFullWidth())
	return n.bar
}

// humanHandler writes log records for a person at a terminal: the message,
// then key=value.
type humanHandler struct {
	w     io.Writer
	attrs string // formatted, from WithAttrs
	group string // prefix of keys, from WithGroup
}

func (h *humanHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *humanHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		b.WriteString("warning: ")
	}
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		writeAttr(&b, h.group, a)
		return true
	})
	b.WriteByte('\n')
	_, err := io.WriteString(h.w, b.String())
	return err
}

func (h *humanHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	b.WriteString(h.attrs)
	for _, a := range attrs {
		writeAttr(&b, h.group, a)
	}
	return &humanHandler{h.w, b.String(), h.group}
}

func (h *humanHandler) WithGroup(name string) slog.Handler {
	return &humanHandler{h.w, h.attrs, h.group + name + "."}
}

func writeAttr(b *strings.Builder, group string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, inner := range v.Group() {
			writeAttr(b, group, inner)
		}
		return
	}
	if a.Equal(slog.Attr{}) {
		return
	}
	text := v.String()
	if v.Kind() == slog.KindFloat64 {
		text = strconv.FormatFloat(v.Float64(), 'g', 4, 64) // a person reads 0.9876, not seventeen digits
	}
	if strings.ContainsAny(text, " \t\r\n\"") || strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
		text = strconv.Quote(text)
	}
	b.WriteString("  " + group + a.Key + "=" + text)
}

// levelHandler drops records below a level.
type levelHandler struct {
	slog.Handler
	least slog.Level
}

func (h levelHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= h.least && h.Handler.Enabled(ctx, l)
}

func (h levelHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return levelHandler{h.Handler.WithAttrs(a), h.least}
}

func (h levelHandler) WithGroup(name string) slog.Handler {
	return levelHandler{h.Handler.WithGroup(name), h.least}
}
