// Package onnx stores networks as ONNX, Temper's only weight format, and reads
// the same kind of network from the exporters of other frameworks.
//
// ONNX holds images as [N, channels, height, width], convolution weights as
// [out, in, height, width], and dense weights (Gemm with transB=1) as [out, in]
// over inputs in channel, height, width order, as PyTorch does. Package nn holds
// them channels last, so weights are transposed on the way in and out; both
// ways are exact.
package onnx

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// Versions that are written, and those that are read: the operators used here
// have kept their meaning within these.
const (
	irVersion  = 8
	opset      = 17
	minOpset   = 7
	maxOpset   = 25
	producer   = "temper"
	inputName  = "input"
	outputName = "logits"
	batchName  = "N"
)

// ErrNotONNX is wrapped by errors about data that is not an ONNX model at all.
var ErrNotONNX = errors.New("not an ONNX model")

// Unmarshal reads a network and the file's metadata. It refuses what it cannot
// represent exactly, naming the node and what is supported, and weights that no
// trained network has (see (*nn.Network).Check). Memory, data included, stays
// about twice the size of data; the network does not alias data.
func Unmarshal(data []byte) (*nn.Network, map[string]string, error) {
	if len(data) > MaxSize {
		return nil, nil, fmt.Errorf("onnx: %d bytes: at most %d", len(data), MaxSize)
	}
	if what := looksLike(data); what != "" {
		return nil, nil, fmt.Errorf("onnx: %w but %s", ErrNotONNX, what)
	}
	m, err := parseModel(data)
	if err != nil {
		if m.irVersion == 0 { // every model starts with it
			return nil, nil, fmt.Errorf("onnx: %w: %w", ErrNotONNX, err)
		}
		return nil, nil, fmt.Errorf("onnx: %w", err)
	}
	switch {
	case m.graph == nil || m.irVersion == 0:
		return nil, nil, fmt.Errorf("onnx: %w: no graph or no version in its %d bytes", ErrNotONNX, len(data))
	case m.opset < minOpset || m.opset > maxOpset:
		return nil, nil, fmt.Errorf("onnx: operator set %d: supported are %d to %d", m.opset, minOpset, maxOpset)
	}
	mean, std, err := normalisation(m.metadata)
	if err != nil {
		return nil, nil, fmt.Errorf("onnx: %w", err)
	}
	net, err := build(m.graph, len(data), mean, std)
	if err != nil {
		return nil, nil, fmt.Errorf("onnx: %w", err)
	}
	if err := net.Check(); err != nil {
		return nil, nil, fmt.Errorf("onnx: %w", err)
	}
	return net, m.metadata, nil
}

// Keys of a file's metadata that say how its input is to be normalised: one
// number for all channels or one for each, separated by commas, in pixels of
// [0,1]. For networks whose training normalised images outside of the network.
const (
	MeanKey = "temper.mean"
	StdKey  = "temper.std"
)

// normalisation takes mean and std out of the metadata: they become a layer.
func normalisation(metadata map[string]string) (mean, std []float32, err error) {
	m, hasMean := metadata[MeanKey]
	s, hasStd := metadata[StdKey]
	if !hasMean && !hasStd {
		return nil, nil, nil
	}
	if !hasMean || !hasStd {
		return nil, nil, fmt.Errorf("metadata: %s and %s belong together: give both", MeanKey, StdKey)
	}
	delete(metadata, MeanKey)
	delete(metadata, StdKey)
	if mean, err = floats(m); err != nil {
		return nil, nil, fmt.Errorf("metadata %s: %w", MeanKey, err)
	}
	if std, err = floats(s); err != nil {
		return nil, nil, fmt.Errorf("metadata %s: %w", StdKey, err)
	}
	return mean, std, nil
}

func floats(text string) ([]float32, error) {
	var out []float32
	for part := range strings.SplitSeq(text, ",") {
		v, err := strconv.ParseFloat(strings.TrimSpace(part), 32)
		if err != nil || len(out) >= nn.MaxChannels {
			return nil, fmt.Errorf("%.80q: numbers separated by commas are expected", text)
		}
		out = append(out, float32(v))
	}
	return out, nil
}

// convOrder calls f with the place of each convolution weight in nn, [k, k, in,
// out], and in ONNX, [out, in, k, k]; with groups, in is what one of them reads.
func convOrder(k, in, out int, f func(nn, onnx int)) {
	for o := range out {
		for i := range in {
			for y := range k {
				for x := range k {
					f(((y*k+x)*in+i)*out+o, ((o*in+i)*k+y)*k+x)
				}
			}
		}
	}
}

// denseOrder calls f with the place of each dense weight in nn, [in, out], and
// in ONNX: [out, in] (transposed) or [in, out]. places are those in nn's input of
// ONNX's inputs, in order.
func denseOrder(places []int, out int, transposed bool, f func(nn, onnx int)) {
	for there, here := range places {
		for o := range out {
			if transposed {
				f(here*out+o, o*len(places)+there)
			} else {
				f(here*out+o, there*out+o)
			}
		}
	}
}
