package inference

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"strconv"
)

// Answer is what a model answered to a request.
type Answer struct {
	Model, Version string
	ID             string
	Parameters     json.RawMessage // echoed; must be valid JSON; empty: left out
	Probabilities  []float32       // [N, Classes]
	Labels         []int64         // [N]
	Classes        int
}

// Append appends the response with the given outputs (none: both) to dst. Its
// headerLength is the length of the JSON before binary data, for the
// HeaderLength HTTP header; -1 when the response is JSON alone.
func (a *Answer) Append(dst []byte, outputs []Output) (response []byte, headerLength int) {
	start, binarySize := len(dst), 0
	dst = append(dst, `{"model_name":`...)
	dst = appendString(dst, a.Model)
	dst = append(dst, `,"model_version":`...)
	dst = appendString(dst, a.Version)
	dst = append(dst, `,"id":`...)
	dst = appendString(dst, a.ID)
	if len(a.Parameters) > 0 {
		dst = append(dst, `,"parameters":`...)
		dst = append(dst, a.Parameters...)
	}
	dst = append(dst, `,"outputs":[`...)
	for i, o := range outputs {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"name":`...)
		dst = appendString(dst, o.Name)
		dst = append(dst, `,"shape":[`...)
		dst = strconv.AppendInt(dst, int64(len(a.Labels)), 10)
		size := 0
		if o.Name == Probabilities {
			dst = append(dst, ',')
			dst = strconv.AppendInt(dst, int64(a.Classes), 10)
			dst = append(dst, `],"datatype":"FP32"`...)
			size = 4 * len(a.Probabilities)
		} else {
			dst = append(dst, `],"datatype":"INT64"`...)
			size = 8 * len(a.Labels)
		}
		switch {
		case o.Binary:
			dst = append(dst, `,"parameters":{"binary_data_size":`...)
			dst = strconv.AppendInt(dst, int64(size), 10)
			dst = append(dst, '}')
			binarySize += size
		case o.Name == Probabilities:
			dst = append(dst, `,"data":`...)
			dst = appendFloats(dst, a.Probabilities)
		default:
			dst = append(dst, `,"data":[`...)
			for j, l := range a.Labels {
				if j > 0 {
					dst = append(dst, ',')
				}
				dst = strconv.AppendInt(dst, l, 10)
			}
			dst = append(dst, ']')
		}
		dst = append(dst, '}')
	}
	dst = append(dst, `]}`...)
	if binarySize == 0 {
		return dst, -1
	}
	headerLength = len(dst) - start
	for _, o := range outputs {
		switch {
		case !o.Binary:
		case o.Name == Probabilities:
			dst = appendBinary(dst, a.Probabilities)
		default:
			for _, l := range a.Labels {
				dst = binary.LittleEndian.AppendUint64(dst, uint64(l))
			}
		}
	}
	return dst, headerLength
}

func appendString(dst []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil {
		panic("inference: a string that JSON cannot hold: " + err.Error()) // json.Marshal takes every string
	}
	return append(dst, quoted...)
}

func appendFloats(dst []byte, values []float32) []byte {
	dst = append(dst, '[')
	for i, v := range values {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = strconv.AppendFloat(dst, float64(v), 'g', -1, 32)
	}
	return append(dst, ']')
}

func appendBinary(dst []byte, values []float32) []byte {
	for _, v := range values {
		dst = binary.LittleEndian.AppendUint32(dst, math.Float32bits(v))
	}
	return dst
}
