package kernel

// transpose writes the transpose of src [rows, columns] to dst, in blocks that
// stay in the first-level cache.
func transpose(dst, src []float32, rows, columns int) {
	const block = 16
	for i := 0; i < rows; i += block {
		for j := 0; j < columns; j += block {
			for r := i; r < min(i+block, rows); r++ {
				line := src[r*columns:][:columns]
				for c := j; c < min(j+block, columns); c++ {
					dst[c*rows+r] = line[c]
				}
			}
		}
	}
}

// addTo adds src to dst, which is as long.
func addTo(dst, src []float32) {
	for i, v := range src {
		dst[i] += v
	}
}

// sumRows sets sum to the sum of the rows of src, each as long as sum.
func sumRows(sum, src []float32) {
	clear(sum)
	for len(src) > 0 {
		addTo(sum, src[:len(sum)])
		src = src[len(sum):]
	}
}

// maximum raises best to x where x is larger, noting place in index there.
func maximum(best []float32, index []uint8, x []float32, place uint8) {
	for i, v := range x {
		if v > best[i] {
			best[i], index[i] = v, place
		}
	}
}

// selected sets dst to src where index names place, and to 0 elsewhere.
func selected(dst, src []float32, index []uint8, place uint8) {
	for i, v := range src {
		if index[i] == place {
			dst[i] = v
		} else {
			dst[i] = 0
		}
	}
}

// MaskPositive sets dst to grad where y is positive, and to 0 elsewhere: the
// gradient of a ReLU with output y.
func MaskPositive(dst, grad, y []float32) {
	for i, v := range y {
		if v > 0 {
			dst[i] = grad[i]
		} else {
			dst[i] = 0
		}
	}
}

// Add adds src to dst, which is as long.
func Add(dst, src []float32) { addTo(dst, src) }
