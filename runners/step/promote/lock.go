package promote

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/kube"
	"github.com/temper-ml/temper/signing/channel"
)

// maxSwaps is how often others may change the ConfigMap for other channels
// while this one is changed.
const maxSwaps = 20

// configMap is a channel.Lock in a ConfigMap, which has to exist: each channel
// is a key, and is changed with the resourceVersion that it was read with.
type configMap struct {
	api  v1.ConfigMapInterface
	name string // NAMESPACE/NAME, for errors
	base string // NAME
}

// entry is what the ConfigMap holds for a channel, as JSON.
type entry struct {
	Channel string `json:"channel"` // reference
	channel.Place
}

// key is a channel's in the ConfigMap, where few characters are allowed.
func key(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "channel-" + hex.EncodeToString(sum[:8])
}

func (c *configMap) read(ctx context.Context, name string) (*corev1.ConfigMap, channel.Place, error) {
	m, err := c.api.Get(ctx, c.base, metav1.GetOptions{})
	if err != nil {
		return nil, channel.Place{}, kube.Category(fmt.Errorf("--lock: ConfigMap %s: %w", c.name, err))
	}
	text, ok := m.Data[key(name)]
	if !ok {
		return m, channel.Place{}, nil
	}
	var e entry
	err = json.Unmarshal([]byte(text), &e)
	if err == nil && (e.Channel != name || e.Sequence < 1) {
		err = fmt.Errorf("it is number %d of channel %.300q", e.Sequence, e.Channel)
	}
	if err != nil { // what is there says nothing: nobody may go on as if nothing was there
		return nil, channel.Place{}, step.Refused(fmt.Errorf("--lock: ConfigMap %s: entry %s is damaged: %w; remove it", c.name, key(name), err))
	}
	return m, e.Place, nil
}

func (c *configMap) Get(ctx context.Context, name string) (channel.Place, error) {
	_, p, err := c.read(ctx, name)
	return p, err
}

func (c *configMap) Swap(ctx context.Context, name string, old, next channel.Place) error {
	text, err := json.Marshal(entry{name, next})
	if err != nil {
		return err
	}
	for range maxSwaps {
		m, now, err := c.read(ctx, name)
		if err != nil {
			return err
		}
		if now == next {
			return nil // changed by an earlier try, whose answer was lost
		}
		if now != old {
			return &channel.Conflict{Channel: name, Reason: fmt.Sprintf("another promotion became number %d first: evaluate against it and try again", now.Sequence)}
		}
		if m.Data == nil {
			m.Data = map[string]string{}
		}
		m.Data[key(name)] = string(text)
		_, err = c.api.Update(ctx, m, metav1.UpdateOptions{FieldManager: fieldManager})
		if apierrors.IsConflict(err) { // read again: it may be about another channel
			continue
		}
		if err != nil {
			return kube.Category(fmt.Errorf("--lock: ConfigMap %s: %w", c.name, err))
		}
		return nil
	}
	return step.Unavailable(fmt.Errorf("--lock: ConfigMap %s: others go on changing it: try again", c.name))
}
