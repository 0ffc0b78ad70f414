package sentinel

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// IncidentEvent is the type of the CloudEvent that a Webhook posts, with the
// incident as JSON.
const IncidentEvent = "io.github.temper-ml.incident"

// Webhook is a Defence that tells a URL, such as an Argo Events or Tekton
// event listener. It posts the incident as a CloudEvent whose id is the
// incident's, so a receiver can tell a delivery that comes again.
type Webhook struct {
	url    string
	wait   time.Duration // before the second try; twice as long before each further one
	client *http.Client
}

const (
	webhookTries   = 6 // over about a minute
	webhookWait    = 2 * time.Second
	webhookTimeout = 10 * time.Second
)

// NewWebhook makes a webhook to an http or https URL.
func NewWebhook(target string) (*Webhook, error) {
	u, err := url.Parse(target)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("webhook %q: must be an http or https URL", target)
	}
	return &Webhook{target, webhookWait, &http.Client{
		Timeout:       webhookTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // incidents go to the URL that was named
	}}, nil
}

// Start implements Defence: it returns when the webhook took the incident, or
// did not within some tries.
func (h *Webhook) Start(ctx context.Context, i Incident) error {
	body, err := json.Marshal(i)
	if err != nil {
		return err
	}
	wait := h.wait
	for try := 1; ; try++ {
		again, err := h.post(ctx, i.ID, body)
		if err == nil || !again || try == webhookTries {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
			wait *= 2
		}
	}
}

// post tries once; again says whether another try can help.
func (h *Webhook) post(ctx context.Context, id string, body []byte) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	for k, v := range map[string]string{
		"Content-Type": "application/json", "Ce-Specversion": "1.0",
		"Ce-Type": IncidentEvent, "Ce-Source": "/temper/sentinel", "Ce-Id": id,
	} {
		req.Header.Set(k, v)
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return true, err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection is kept
	if resp.StatusCode/100 == 2 {
		return false, nil
	}
	again = resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout
	return again, fmt.Errorf("the webhook answered %s", resp.Status)
}
