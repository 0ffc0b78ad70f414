package artifact

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/pflag"

	"github.com/temper-ml/temper/models/onnx"
	"github.com/temper-ml/temper/runners/step"
	"github.com/temper-ml/temper/runners/step/serve/selftest"
)

// Normalisation is how the training of a foreign model normalised images
// outside of its network: (pixel - mean) / std, in pixels of [0,1], one number
// for all channels or one for each, separated by commas. It becomes the
// network's first layer, so that epsilon keeps its meaning.
//
// A model's reference may end in it: MODEL?mean=0.1307&std=0.3081.
type Normalisation struct{ Mean, Std string }

// Flags defines --mean and --std.
func (n *Normalisation) Flags(flags *pflag.FlagSet) {
	flags.StringVar(&n.Mean, "mean", "", "mean that the model's training subtracted from pixels of [0,1], one number or one for each channel, such as 0.491,0.482,0.447")
	flags.StringVar(&n.Std, "std", "", "standard deviation that it divided them by; --model FILE?mean=...&std=... says the same")
}

// Of is the reference of a model that is normalised so.
func (n *Normalisation) Of(ref string) string {
	if n.Mean == "" && n.Std == "" {
		return ref
	}
	return ref + "?" + url.Values{"mean": {n.Mean}, "std": {n.Std}}.Encode()
}

// normalisation takes what a reference ends in from it.
func normalisation(ref string) (string, *Normalisation, error) {
	bare, query, ok := strings.Cut(ref, "?")
	if !ok {
		return ref, nil, nil
	}
	values, err := url.ParseQuery(query)
	n := &Normalisation{Mean: values.Get("mean"), Std: values.Get("std")}
	if err != nil || len(values) != 2 || len(values["mean"]) != 1 || len(values["std"]) != 1 || n.Mean == "" || n.Std == "" {
		return ref, nil, step.BadInput(fmt.Errorf("model %s: after ?, give mean=...&std=..., and both of them", ref))
	}
	return bare, n, nil
}

// apply puts the normalisation into a model. What it recorded of itself before
// is left out: another network's outputs.
func (n *Normalisation) apply(m *Model, metadata map[string]string) error {
	delete(metadata, selftest.MetadataKey)
	metadata[onnx.MeanKey], metadata[onnx.StdKey] = n.Mean, n.Std
	data, err := onnx.Marshal(m.Network, metadata)
	if err != nil {
		return err
	}
	if m.Network, metadata, err = onnx.Unmarshal(data); err != nil {
		return err
	}
	m.Manifest = "" // the artifact holds another network
	m.ONNX, err = onnx.Marshal(m.Network, metadata)
	return err
}
