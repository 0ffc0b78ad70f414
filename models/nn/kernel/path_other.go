//go:build !amd64

package kernel

func available() []string { return []string{"portable"} }

func (p *product) dispatch() { p.portable() }
