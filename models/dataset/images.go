package dataset

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"image"
	"image/color"
	_ "image/jpeg" // for image.Decode
	_ "image/png"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/temper-ml/temper/models/nn"
)

const (
	// maxImageFile bounds one image's file: the largest image Temper takes,
	// uncompressed at 16 bits a channel, twice over.
	maxImageFile = 16 << 20
	// testShare divides a folder without parts: one image in testShare is for
	// the test, as in MNIST one in seven is.
	testShare = 6
	// minDivided is too few images to be divided: a test part of a handful
	// would say nothing.
	minDivided = 4 * testShare
)

// picture is one image file.
type picture struct {
	file  string
	label uint8
	at    int               // place among all pictures as listed
	sum   [sha256.Size]byte // of its pixels
}

// readImages reads a folder of PNG and JPEG images by class: train/CLASS/*.png
// and test/CLASS/*.png (and validation/CLASS), or CLASS/*.png, of which a sixth
// becomes the test part. All images must have one size. They are grey if every
// one of them is, else all have three channels.
//
// A part's images are in the order of the SHA-256 of their pixels, and the same
// sum says which are for the test: neither depends on how files are named, and
// copies of an image never lie on both sides.
func readImages(ctx context.Context, name string, dir fs.FS, folders []string) (*Splits, []string, error) {
	s := &Splits{Name: name}
	sets := []**Set{&s.Train, &s.Validation, &s.Test}
	divided := !slices.ContainsFunc(folders, isPart)
	var classes []string
	var err error
	if divided {
		classes = folders
	} else if classes, err = classFolders(dir, folders); err != nil {
		return nil, nil, err
	}
	if classes, err = orderClasses(dir, classes); err != nil {
		return nil, nil, err
	}
	shape := nn.Shape{Channels: 1}
	listed := make([][]picture, len(parts))
	for i, p := range parts {
		*sets[i] = &Set{Name: name + "/" + p.name}
		for _, folder := range p.folders {
			if divided && p.name == trainPart.name {
				folder = "."
			} else if !slices.Contains(folders, folder) {
				continue
			}
			more, err := listImages(ctx, dir, folder, classes, &shape)
			if err != nil {
				return nil, nil, err
			}
			listed[i] = append(listed[i], more...)
			if divided {
				break
			}
		}
	}
	if divided && len(listed[0]) < minDivided {
		return nil, nil, fmt.Errorf("%d images: too few to be divided: at least %d, or put them into train/CLASS and test/CLASS", len(listed[0]), minDivided)
	}
	for i, pictures := range listed {
		if len(pictures) == 0 {
			continue
		}
		if divided {
			err = decodeImages(ctx, dir, pictures, shape, s.Train, s.Test)
			break
		}
		if err = decodeImages(ctx, dir, pictures, shape, *sets[i], nil); err != nil {
			break
		}
	}
	return s, classes, err
}

func isPart(folder string) bool {
	return slices.ContainsFunc(parts, func(p part) bool { return slices.Contains(p.folders, folder) })
}

// classFolders lists the classes of all parts.
func classFolders(dir fs.FS, folders []string) ([]string, error) {
	var classes []string
	for _, folder := range folders {
		if !isPart(folder) {
			return nil, fmt.Errorf("folder %s beside %s: expected train, validation and test, with a folder for each class in them", folder, strings.Join(slices.DeleteFunc(slices.Clone(folders), func(f string) bool { return !isPart(f) }), ", "))
		}
		found, err := subfolders(dir, folder)
		if err != nil {
			return nil, err
		}
		classes = append(classes, found...)
	}
	slices.Sort(classes)
	return slices.Compact(classes), nil
}

// orderClasses puts class folders into the order of classes.txt, where there is
// one; without it they are in the order of their names, as other frameworks
// number them.
func orderClasses(dir fs.FS, folders []string) ([]string, error) {
	classes, err := parseClasses("class folders", strings.Join(folders, "\n"))
	if err != nil {
		return nil, err
	}
	if _, err := fs.Stat(dir, classesFile); errors.Is(err, fs.ErrNotExist) {
		return classes, nil
	}
	data, err := readFile(dir, classesFile, maxClassesFile)
	if err != nil {
		return nil, err
	}
	ordered, err := parseClasses(classesFile, string(data))
	if err != nil {
		return nil, err
	}
	for _, c := range classes {
		if !slices.Contains(ordered, c) {
			return nil, fmt.Errorf("folder %s: %s names no such class: add it there", c, classesFile)
		}
	}
	return ordered, nil
}

// subfolders lists the folders in a folder, but for hidden ones, by name.
func subfolders(dir fs.FS, folder string) ([]string, error) {
	entries, err := fs.ReadDir(dir, folder)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			found = append(found, e.Name())
		}
	}
	return found, nil
}

// listImages lists the images of a part and reads their headers: all must have
// the shape's height and width, which the first one sets; a colour image makes
// it three channels.
func listImages(ctx context.Context, dir fs.FS, folder string, classes []string, shape *nn.Shape) ([]picture, error) {
	var pictures []picture
	for label, class := range classes {
		entries, err := fs.ReadDir(dir, path.Join(folder, class))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			file := path.Join(folder, class, e.Name())
			if strings.HasPrefix(e.Name(), ".") { // such as .DS_Store
				continue
			}
			switch strings.ToLower(path.Ext(file)) {
			case ".png", ".jpg", ".jpeg":
			default:
				return nil, fmt.Errorf("%s: neither a PNG nor a JPEG image by its name: convert or remove it", file)
			}
			config, err := readConfig(dir, file)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			if shape.Height == 0 {
				shape.Height, shape.Width = config.Height, config.Width
			}
			if config.Height != shape.Height || config.Width != shape.Width {
				return nil, fmt.Errorf("%s: %d pixels high and %d wide, but the images before it are %d and %d: scale all to one size", file, config.Height, config.Width, shape.Height, shape.Width)
			}
			if !isGrey(config.ColorModel) {
				shape.Channels = 3
			}
			pictures = append(pictures, picture{file: file, label: uint8(label), at: len(pictures)})
			if size := shape.Size(); len(pictures) > MaxFile/size {
				return nil, fmt.Errorf("%s: the images before it fill the %d bytes that a part may have", file, MaxFile)
			}
		}
	}
	return pictures, nil
}

// readConfig reads an image's header, and refuses a size beyond what Temper
// takes before anything is decoded.
func readConfig(dir fs.FS, file string) (image.Config, error) {
	if _, err := regular(dir, file, maxImageFile); err != nil {
		return image.Config{}, err
	}
	f, err := dir.Open(file)
	if err != nil {
		return image.Config{}, err
	}
	defer f.Close()
	config, format, err := image.DecodeConfig(f)
	if err != nil {
		return config, fmt.Errorf("not a PNG or JPEG image: %w", err)
	}
	if format != "png" && format != "jpeg" {
		return config, fmt.Errorf("a %s image: only PNG and JPEG are read", format)
	}
	return config, checkShape(nn.Shape{Height: config.Height, Width: config.Width, Channels: 1})
}

// isGrey tells whether an image of that colour model has grey values only.
func isGrey(m color.Model) bool {
	if palette, ok := m.(color.Palette); ok {
		return !slices.ContainsFunc(palette, func(c color.Color) bool {
			r, g, b, _ := c.RGBA()
			return r != g || g != b
		})
	}
	return m == color.GrayModel || m == color.Gray16Model
}

// decodeImages reads the pixels of pictures into set, or, where test is not
// nil, a share of them into test.
func decodeImages(ctx context.Context, dir fs.FS, pictures []picture, shape nn.Shape, set, test *Set) error {
	size := shape.Size()
	all, err := newPixels(len(pictures) * size)
	if err != nil {
		return err
	}
	defer all.close()
	row := make([]byte, size)
	for i := range pictures {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := decodeImage(dir, pictures[i].file, shape, row); err != nil {
			return fmt.Errorf("%s: %w", pictures[i].file, err)
		}
		pictures[i].sum = sha256.Sum256(row)
		if _, err := all.Write(row); err != nil {
			return err
		}
	}
	listed, err := all.bytes()
	if err != nil {
		return err
	}
	defer unmap(listed)
	slices.SortFunc(pictures, func(a, b picture) int {
		return cmp.Or(bytes.Compare(a.sum[:], b.sum[:]), cmp.Compare(a.label, b.label))
	})
	if test != nil {
		// The last byte, as the first ones already order the images.
		first := func(p picture) bool { return p.sum[sha256.Size-1]%testShare != 0 }
		var rest []picture
		for _, p := range pictures {
			if !first(p) {
				rest = append(rest, p)
			}
		}
		if err := test.take(rest, listed, shape); err != nil {
			return err
		}
		pictures = slices.DeleteFunc(pictures, func(p picture) bool { return !first(p) })
	}
	return set.take(pictures, listed, shape)
}

// take fills the set with pictures, whose pixels are among those listed.
func (s *Set) take(pictures []picture, listed []byte, shape nn.Shape) error {
	if len(pictures) == 0 {
		return nil
	}
	size := shape.Size()
	p, err := newPixels(len(pictures) * size)
	if err != nil {
		return err
	}
	defer p.close()
	s.Shape = shape
	for _, from := range pictures {
		if _, err := p.Write(listed[from.at*size : (from.at+1)*size]); err != nil {
			return err
		}
		s.Labels = append(s.Labels, from.label)
	}
	s.Bytes, err = p.bytes()
	return err
}

// decodeImage reads one image into row, [height, width, channels]. Values of 16
// bits lose their low byte.
func decodeImage(dir fs.FS, file string, shape nn.Shape, row []byte) error {
	config, err := readConfig(dir, file) // again: the file may be another by now
	if err != nil {
		return err
	}
	if config.Height != shape.Height || config.Width != shape.Width || shape.Channels == 1 && !isGrey(config.ColorModel) {
		return errors.New("it changed while it was read")
	}
	f, err := dir.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	img, _, err := image.Decode(io.LimitReader(f, maxImageFile))
	if err != nil {
		return fmt.Errorf("damaged: %w", err)
	}
	b := img.Bounds()
	if b.Dy() != shape.Height || b.Dx() != shape.Width {
		return errors.New("it changed while it was read")
	}
	if o, ok := img.(interface{ Opaque() bool }); ok && !o.Opaque() {
		return errors.New("it is transparent in places, and what a model sees there depends on the program: save it without transparency")
	}
	at := 0
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			r, g, bl, _ := img.At(x, y).RGBA()
			if shape.Channels == 1 {
				row[at] = byte(r >> 8)
				at++
				continue
			}
			row[at], row[at+1], row[at+2] = byte(r>>8), byte(g>>8), byte(bl>>8)
			at += 3
		}
	}
	return nil
}
