package inference

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"unicode/utf8"
)

// Bounds on a message, beside the byte limit of whoever reads the body.
const (
	maxDepth   = 16      // nesting of arrays and objects; real requests need about 8
	maxTensors = 8       // inputs or requested outputs; Temper's models have one input and two outputs
	maxString  = 256     // bytes of an id, a tensor name or a key
	maxEcho    = 4 << 10 // bytes of request parameters, which are echoed
	maxDigits  = 64      // characters of a number; a float64 needs at most 25
)

// parser walks a JSON text once, without building a tree: pixels are most of
// a request, and encoding/json needs ten times as long for them.
type parser struct {
	text []byte
	at   int
}

func (p *parser) fail(format string, args ...any) error {
	return fmt.Errorf("invalid JSON at byte %d: %s", p.at, fmt.Sprintf(format, args...))
}

// next skips white space and returns the next byte without consuming it; 0 at
// the end of the text.
func (p *parser) next() byte {
	for p.at < len(p.text) {
		switch c := p.text[p.at]; c {
		case ' ', '\t', '\n', '\r':
			p.at++
		default:
			return c
		}
	}
	return 0
}

func (p *parser) expect(c byte) error {
	if got := p.next(); got != c {
		if p.at >= len(p.text) {
			return p.fail("the text ends where %q is expected", c)
		}
		return p.fail("%q where %q is expected", got, c)
	}
	p.at++
	return nil
}

// end checks that only white space is left.
func (p *parser) end() error {
	if p.next(); p.at < len(p.text) {
		return p.fail("text after the end of the message")
	}
	return nil
}

// object calls field for each key; field must consume the value. A null value
// counts as absent, as clients write it for fields they do not set. A key that
// comes twice is an error: two readers of one message must not see two
// different requests.
func (p *parser) object(field func(key []byte) error) error {
	if err := p.expect('{'); err != nil {
		return err
	}
	var seen [16][]byte
	for n := 0; ; n++ {
		if p.next() == '}' && n == 0 {
			p.at++
			return nil
		}
		key, err := p.stringBytes()
		if err != nil {
			return err
		}
		if n == len(seen) {
			return p.fail("more than %d fields", len(seen))
		}
		for _, s := range seen[:n] {
			if string(s) == string(key) {
				return p.fail("field %q twice", key)
			}
		}
		seen[n] = key
		if err := p.expect(':'); err != nil {
			return err
		}
		if p.next() == 'n' {
			err = p.literal("null")
		} else {
			err = field(key)
		}
		if err != nil {
			return err
		}
		if p.next() == ',' {
			p.at++
			continue
		}
		return p.expect('}')
	}
}

// array calls element before each element; element must consume it.
func (p *parser) array(element func() error) error {
	if err := p.expect('['); err != nil {
		return err
	}
	if p.next() == ']' {
		p.at++
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		if p.next() == ',' {
			p.at++
			continue
		}
		return p.expect(']')
	}
}

// stringBytes reads a string of at most maxString bytes. The result is a
// window into the text where the string has no escapes.
func (p *parser) stringBytes() ([]byte, error) {
	if err := p.expect('"'); err != nil {
		return nil, err
	}
	start, plain := p.at, true
	for ; p.at < len(p.text); p.at++ {
		if p.at-start > maxString {
			return nil, p.fail("a string of more than %d bytes", maxString)
		}
		switch c := p.text[p.at]; {
		case c == '"':
			s := p.text[start:p.at]
			p.at++
			if !utf8.Valid(s) {
				return nil, p.fail("a string that is not UTF-8")
			}
			if plain {
				return s, nil
			}
			var unquoted string
			if err := json.Unmarshal(p.text[start-1:p.at], &unquoted); err != nil {
				return nil, p.fail("%v", err)
			}
			return []byte(unquoted), nil
		case c == '\\':
			plain = false
			p.at++
		case c < ' ':
			return nil, p.fail("a control character in a string")
		}
	}
	return nil, p.fail("the text ends in a string")
}

func (p *parser) string() (string, error) {
	s, err := p.stringBytes()
	return string(s), err
}

func (p *parser) literal(word string) error {
	if p.next(); len(p.text)-p.at < len(word) || string(p.text[p.at:p.at+len(word)]) != word {
		return p.fail("%s is expected", word)
	}
	p.at += len(word)
	return nil
}

func (p *parser) bool() (bool, error) {
	if p.next() == 't' {
		return true, p.literal("true")
	}
	return false, p.literal("false")
}

// integer reads a whole number from 0 to the largest int32.
func (p *parser) integer() (int, error) {
	p.next()
	start := p.at
	for p.at < len(p.text) && p.text[p.at] >= '0' && p.text[p.at] <= '9' {
		p.at++
	}
	digits := p.text[start:p.at]
	if len(digits) == 0 || len(digits) > 10 || (len(digits) > 1 && digits[0] == '0') {
		return 0, p.fail("a whole number from 0 to %d is expected", math.MaxInt32)
	}
	n := 0
	for _, d := range digits {
		n = n*10 + int(d-'0')
	}
	if n > math.MaxInt32 {
		return 0, p.fail("a whole number from 0 to %d is expected", math.MaxInt32)
	}
	return n, nil
}

// skip checks and passes over one value; depth is the nesting so far.
func (p *parser) skip(depth int) error {
	if depth > maxDepth {
		return p.fail("nested deeper than %d", maxDepth)
	}
	switch c := p.next(); {
	case c == '{':
		return p.object(func([]byte) error { return p.skip(depth + 1) })
	case c == '[':
		return p.array(func() error { return p.skip(depth + 1) })
	case c == '"':
		_, err := p.stringBytes()
		return err
	case c == 't':
		return p.literal("true")
	case c == 'f':
		return p.literal("false")
	case c == 'n':
		return p.literal("null")
	default:
		_, err := p.number()
		return err
	}
}

// Powers of ten that float64 holds exactly.
var tens = [...]float64{1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11,
	1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22}

// number reads a JSON number as the nearest float32, as strconv.ParseFloat
// does; a number beyond float32 is an error. Short numbers take the fast path
// of W. D. Clinger, "How to read floating point numbers accurately" (1990): a
// mantissa below 2^53 times or over an exact power of ten is rounded once.
// Rounding that float64 to float32 rounds a second time, which is wrong only
// where the float64 lies halfway between two float32: those go to strconv.
func (p *parser) number() (float32, error) {
	p.next()
	text, start, i := p.text, p.at, p.at
	if i+1 < len(text) && text[i]-'0' <= 9 && (text[i+1] == ',' || text[i+1] == ']') { // as most pixels of a digit are
		p.at++
		return float32(text[i] - '0'), nil
	}
	negative := i < len(text) && text[i] == '-'
	if negative {
		i++
	}
	var mantissa uint64
	var scale, digits int
	whole := i
	for ; i < len(text) && text[i] >= '0' && text[i] <= '9'; i++ {
		mantissa = mantissa*10 + uint64(text[i]-'0')
	}
	digits = i - whole
	if digits == 0 {
		return 0, p.fail("a number is expected (NaN and Infinity are not JSON)")
	}
	if digits > 1 && text[whole] == '0' {
		return 0, p.fail("a number with leading zeros")
	}
	if i < len(text) && text[i] == '.' {
		i++
		fraction := i
		for ; i < len(text) && text[i] >= '0' && text[i] <= '9'; i++ {
			mantissa = mantissa*10 + uint64(text[i]-'0')
		}
		if i == fraction {
			return 0, p.fail("a number that ends in a point")
		}
		digits += i - fraction
		scale = fraction - i
	}
	if i < len(text) && text[i]|0x20 == 'e' {
		i++
		sign := 1
		if i < len(text) && (text[i] == '+' || text[i] == '-') {
			if text[i] == '-' {
				sign = -1
			}
			i++
		}
		exponent, first := 0, i
		for ; i < len(text) && text[i] >= '0' && text[i] <= '9'; i++ {
			exponent = min(exponent*10+int(text[i]-'0'), 1e6)
		}
		if i == first {
			return 0, p.fail("a number that ends in its exponent sign")
		}
		scale += sign * exponent
	}
	if i-start > maxDigits {
		return 0, p.fail("a number of more than %d characters", maxDigits)
	}
	p.at = i

	// 19 digits always fit in the uint64.
	if digits <= 19 && mantissa < 1<<53 && scale >= -22 && scale <= 22 {
		v := float64(mantissa)
		if scale < 0 {
			v /= tens[-scale]
		} else {
			v *= tens[scale]
		}
		if halfway := math.Float64bits(v)&(1<<29-1) == 1<<28; !halfway {
			if negative {
				v = -v
			}
			return float32(v), nil
		}
	}
	v, err := strconv.ParseFloat(string(text[start:i]), 32)
	if errors.Is(err, strconv.ErrRange) {
		return 0, p.fail("the number %s is out of range", text[start:i])
	} else if err != nil {
		return 0, p.fail("%v", err)
	}
	return float32(v), nil
}
