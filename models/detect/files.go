package detect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/temper-ml/temper/models/onnx"
)

// A detector is two files of one artifact.
const (
	GuardFile       = "guard.onnx"
	CalibrationFile = "detector.json"
)

// maxCalibration is several times the largest calibration.
const maxCalibration = 4 << 20

// Encode returns the content of GuardFile and CalibrationFile. The same
// detector gives the same bytes.
func (d *Detector) Encode() (guard, calibration []byte, err error) {
	if err := d.Check(); err != nil {
		return nil, nil, fmt.Errorf("detector: %w", err)
	}
	if guard, err = onnx.Marshal(d.Guard, nil); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", GuardFile, err)
	}
	if calibration, err = json.Marshal(d.Calibration); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", CalibrationFile, err)
	}
	return guard, append(calibration, '\n'), nil
}

// Decode reads what Encode wrote, and refuses everything else.
func Decode(guard, calibration []byte) (*Detector, error) {
	d := &Detector{}
	if len(calibration) > maxCalibration {
		return nil, fmt.Errorf("%s: %d bytes: at most %d", CalibrationFile, len(calibration), maxCalibration)
	}
	j := json.NewDecoder(bytes.NewReader(calibration))
	j.DisallowUnknownFields()
	if err := j.Decode(&d.Calibration); err != nil {
		return nil, fmt.Errorf("%s: %w", CalibrationFile, err)
	}
	if _, err := j.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more after the JSON object", CalibrationFile)
	}
	var err error
	if d.Guard, _, err = onnx.Unmarshal(guard); err != nil {
		return nil, fmt.Errorf("%s: %w", GuardFile, err)
	}
	if err := d.Check(); err != nil {
		return nil, fmt.Errorf("%s: %w", CalibrationFile, err)
	}
	return d, nil
}
