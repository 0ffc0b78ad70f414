package inference

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// maxAnswer bounds an answer that a client reads: 2^16 images of 10 classes
// as JSON are about 10 MB.
const maxAnswer = 64 << 20

// Client asks a server of this protocol for the labels of images. It is safe
// for concurrent use.
type Client struct {
	URL    string // of the server, such as http://127.0.0.1:8080
	Model  string
	Binary bool         // send pixels by the binary-data extension
	HTTP   *http.Client // nil: http.DefaultClient
}

// StatusError is an answer other than 200.
type StatusError struct {
	Code    int
	Message string // of the answer's {"error": ...}, or the start of its body
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the server answered %d: %s", e.Code, e.Message)
}

// Predict classifies n images: pixels from 0 to 1 in package nn's order
// [n, height, width, channels]. A *StatusError says what the server refused.
func (c *Client) Predict(ctx context.Context, pixels []float32, n int, shape nn.Shape) (*Answer, error) {
	body, headerLength := AppendRequest(nil, pixels, n, shape, c.Binary)
	target := strings.TrimSuffix(c.URL, "/") + "/v2/models/" + url.PathEscape(c.Model) + "/infer"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if headerLength >= 0 {
		req.Header.Set("Content-Type", "application/octet-stream")
		req.Header.Set(HeaderLength, strconv.Itoa(headerLength))
	}
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of %s: %w", target, err)
	}
	if len(data) > maxAnswer {
		return nil, fmt.Errorf("the answer of %s is larger than %d bytes", target, maxAnswer)
	}
	if resp.StatusCode != http.StatusOK {
		var refused struct{ Error string }
		if json.Unmarshal(data, &refused) != nil || refused.Error == "" {
			refused.Error = string(data[:min(len(data), 200)])
		}
		return nil, &StatusError{resp.StatusCode, refused.Error}
	}
	a, err := ParseAnswer(data)
	if err != nil {
		return nil, fmt.Errorf("the answer of %s: %w", target, err)
	}
	if len(a.Labels) != n {
		return nil, fmt.Errorf("the answer of %s has %d labels for %d images", target, len(a.Labels), n)
	}
	return a, nil
}

// AppendRequest appends a request for n images to dst: pixels from 0 to 1 in
// package nn's order [n, height, width, channels]. Its headerLength is for the
// HeaderLength HTTP header, -1 when the request is JSON alone.
func AppendRequest(dst []byte, pixels []float32, n int, shape nn.Shape, binary bool) (request []byte, headerLength int) {
	pixels = pixels[:n*shape.Size()]
	if shape.Channels > 1 {
		first := make([]float32, len(pixels))
		channelsFirst(first, pixels, n, shape)
		pixels = first
	}
	start := len(dst)
	dst = fmt.Appendf(dst, `{"inputs":[{"name":%q,"shape":[%d,%d,%d,%d],"datatype":"FP32"`, Input, n, shape.Channels, shape.Height, shape.Width)
	if binary {
		dst = fmt.Appendf(dst, `,"parameters":{"binary_data_size":%d}}]}`, 4*len(pixels))
		headerLength = len(dst) - start
		return appendBinary(dst, pixels), headerLength
	}
	dst = append(dst, `,"data":`...)
	dst = appendFloats(dst, pixels)
	return append(dst, `}]}`...), -1
}

// ParseAnswer reads a JSON response; it need not have both outputs. A server of
// the ONNX file itself answers with Logits: the labels are then the first
// largest of each image.
func ParseAnswer(data []byte) (*Answer, error) {
	var response struct {
		ModelName    string          `json:"model_name"`
		ModelVersion string          `json:"model_version"`
		ID           string          `json:"id"`
		Parameters   json.RawMessage `json:"parameters"`
		Outputs      []struct {
			Name  string          `json:"name"`
			Shape []int           `json:"shape"`
			Data  json.RawMessage `json:"data"`
		} `json:"outputs"`
	}
	if err := json.Unmarshal(data, &response); err != nil {
		return nil, err
	}
	rows := func(shape []int, values []float32) error {
		if len(shape) != 2 || shape[0] < 0 || shape[1] < 1 {
			return fmt.Errorf("shape %v, not [N, classes]", shape)
		}
		if len(values)%shape[1] != 0 || len(values)/shape[1] != shape[0] {
			return fmt.Errorf("%d values for shape %v", len(values), shape)
		}
		return nil
	}
	var largest []int64 // of the logits
	a := &Answer{Model: response.ModelName, Version: response.ModelVersion, ID: response.ID, Parameters: response.Parameters}
	for _, o := range response.Outputs {
		var err error
		switch o.Name {
		case Probabilities:
			if err = json.Unmarshal(o.Data, &a.Probabilities); err == nil {
				err = rows(o.Shape, a.Probabilities)
			}
			if err == nil {
				a.Classes = o.Shape[1]
			}
		case Logits:
			var logits []float32
			if err = json.Unmarshal(o.Data, &logits); err == nil {
				err = rows(o.Shape, logits)
			}
			if err == nil {
				for row := range slices.Chunk(logits, o.Shape[1]) {
					largest = append(largest, int64(slices.Index(row, slices.Max(row))))
				}
			}
		case Label:
			err = json.Unmarshal(o.Data, &a.Labels)
			if err == nil && !slices.Equal(o.Shape, []int{len(a.Labels)}) {
				err = fmt.Errorf("%d values for shape %v", len(a.Labels), o.Shape)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("output %q: %w", o.Name, err)
		}
	}
	if a.Labels == nil {
		a.Labels = largest
	}
	if a.Classes > 0 && a.Labels != nil && len(a.Probabilities) != len(a.Labels)*a.Classes {
		return nil, errors.New("the outputs are for different numbers of images")
	}
	return a, nil
}
