package dataset

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

// The binary form of CIFAR-10: records of a label and a 32x32 image, plane by
// plane: red, green, blue. https://www.cs.toronto.edu/~kriz/cifar.html
const (
	cifarTrain   = "data_batch_*.bin"
	cifarTest    = "test_batch.bin"
	cifarMeta    = "batches.meta.txt"
	cifarClasses = 10
)

var cifarShape = nn.Shape{Height: 32, Width: 32, Channels: 3}

// readCIFAR reads the batches that a folder holds.
func readCIFAR(name string, dir fs.FS) (*Splits, error) {
	s := &Splits{Name: name, Validation: &Set{Name: name + "/validation"}}
	var err error
	if s.Train, err = readBatches(name+"/train", dir, cifarTrain); err != nil {
		return nil, err
	}
	s.Test, err = readBatches(name+"/test", dir, cifarTest)
	return s, err
}

// readBatches reads the files of one part, in the order of their names; an
// empty set where there are none.
func readBatches(name string, dir fs.FS, pattern string) (*Set, error) {
	files, err := fs.Glob(dir, pattern)
	if err != nil {
		return nil, err
	}
	s := &Set{Name: name}
	if len(files) == 0 {
		return s, nil
	}
	record, examples := 1+cifarShape.Size(), 0
	counts := make([]int, len(files))
	for i, file := range files {
		info, err := regular(dir, file, MaxFile)
		if err != nil {
			return nil, fmt.Errorf("dataset %s: %s: %w", name, file, err)
		}
		counts[i] = int(info.Size()) / record
		if counts[i] == 0 || int(info.Size())%record != 0 {
			return nil, fmt.Errorf("dataset %s: %s: %d bytes: CIFAR-10's binary form has %d for each image (a label, then 32x32 pixels in red, green, blue)", name, file, info.Size(), record)
		}
		if examples += counts[i]; examples > MaxFile/cifarShape.Size() {
			return nil, fmt.Errorf("dataset %s: more than %d bytes of pixels", name, MaxFile)
		}
	}
	p, err := newPixels(examples * cifarShape.Size())
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", name, err)
	}
	defer p.close()
	s.Shape, s.Labels = cifarShape, make([]byte, 0, examples)
	for i, file := range files {
		if err := s.readBatch(dir, file, counts[i], p); err != nil {
			return nil, fmt.Errorf("dataset %s: %s: %w", name, file, err)
		}
	}
	s.Bytes, err = p.bytes()
	return s, err
}

// readBatch appends one file's labels, and its pixels with the channels
// together.
func (s *Set) readBatch(dir fs.FS, file string, examples int, p *pixels) error {
	f, err := dir.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 64<<10)
	plane := cifarShape.Height * cifarShape.Width
	record, image := make([]byte, 1+3*plane), make([]byte, 3*plane)
	for i := range examples {
		if _, err := io.ReadFull(in, record); err != nil {
			return fmt.Errorf("image %d: %w", i, err)
		}
		if record[0] >= cifarClasses {
			return fmt.Errorf("image %d has label %d: CIFAR-10 has 0 to %d", i, record[0], cifarClasses-1)
		}
		s.Labels = append(s.Labels, record[0])
		for at := range plane {
			for channel := range 3 {
				image[3*at+channel] = record[1+channel*plane+at]
			}
		}
		if _, err := p.Write(image); err != nil {
			return err
		}
	}
	return nil
}

// cifarNames are the names of the classes, from the file that CIFAR-10 comes
// with or from classes.txt.
func cifarNames(dir fs.FS) ([]string, error) {
	file := cifarMeta
	if _, err := fs.Stat(dir, file); err != nil {
		file = classesFile
	}
	data, err := readFile(dir, file, maxClassesFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %s names CIFAR-10's classes, one a line", err, cifarMeta)
	}
	classes, err := parseClasses(path.Base(file), strings.TrimRight(string(data), "\r\n"))
	if err == nil && len(classes) != cifarClasses {
		err = fmt.Errorf("%s: %d classes: CIFAR-10 has %d", file, len(classes), cifarClasses)
	}
	return classes, err
}
