package kernel
import ("testing";"fmt")
func BenchmarkYY(b *testing.B) {
	strip := make([]float32, 4096+64)
	out := make([]float32, 26*26*16*32)
	mask := make([]float32, 26*26*16*32)
	places := make([]int8, 12*12*32*32)
	img := make([]float32, 28*28*16)
	dy := make([]float32, 12*12*16*32)
	joined := make([]float32, 27*14*32*2)
	n := 0
	for _, c := range []struct{name string; f func()}{
		{"round26x26x32masked", func(){ n=(n+1)%32; o:=out[n*26*26*16:]; m:=mask[n*26*26*16:]; for i:=0;i<26;i+=4 { k:=min(4,26-i)*26*32; roundMasked(o[i*26*16:], strip[:k], m[i*26*16:], false)} }},
		{"round26x26x32", func(){ n=(n+1)%32; o:=out[n*26*26*16:]; for i:=0;i<26;i+=4 { k:=min(4,26-i)*26*32; roundMasked(o[i*26*16:], strip[:k], nil, true)} }},
		{"round26x26x32sameplace", func(){ o:=out; for i:=0;i<26;i+=4 { k:=min(4,26-i)*26*32; roundMasked(o, strip[:k], nil, true)} }},
		{"unpool24x24x32", func(){ n=(n+1)%32; for py:=range 12 { unpoolPairs(img[py*2*28*16:], dy[n*12*12*16+py*12*16:], places[n*12*12*32+py*12*32:][:12*32], 28*16, 32) } }},
		{"pool24x24x32", func(){ n=(n+1)%32; for py:=range 12 { poolPairs(dy[n*12*12*16+py*12*16:], places[n*12*12*32+py*12*32:][:12*32], strip, 24*32, 32) } }},
		{"join26x13x32", func(){ n=(n+1)%32; joinPixels(joined, out[n*26*26*16:], 26, 13*32, 26*16, 13, 16, 32, 32) }},
		{"transpose320x32", func(){ transposeTo(out, joined, 320, 32, 320, 32) }},
		{"memcpy43K", func(){ n=(n+1)%32; copy(img, out[n*26*26*16:][:26*26*16]) }},
	} {
		b.Run(c.name, func(b *testing.B){ for b.Loop() { c.f() } })
	}
}


func BenchmarkZZ(b *testing.B) {
	for _, c := range []struct{m, n, steps, seg, lines, width, ch int}{
		{24,32,48,3,4,26,16},{24,32,48,3,24,26,16},{32,32,48,3,24,34,16},{16,32,48,3,24,34,16},{26,32,48,3,26,28,16},{10,64,48,3,10,12,16},{8,64,96,3,8,10,32},{10,64,96,3,10,12,32},{12,32,96,3,12,14,32},
	} {
		a := make([]float32, (c.lines+3)*c.width*c.ch+64)
		w := make([]float32, c.seg*c.steps*c.n)
		y := make([]float32, c.lines*c.m*c.n)
		for i := range a { a[i]=join(float32(i%7)-3.3, float32(i%5)*.37-1) }; for i := range w { w[i]=join(float32(i%11)*.1-.5, float32(i%13)*.1-.6) }
		p := product{m:c.m,n:c.n,steps:c.steps,segments:c.seg,a:a,aRow:c.ch,aStep:1,aSegment:c.width*c.ch,b:w,bStep:c.n,bSegment:c.steps*c.n,c:y,cRow:c.n,pairs:true,lines:c.lines,aLine:c.width*c.ch,cLine:c.m*c.n}
		if inStrips(c.n) { p.bStep=32; p.bSegment=c.steps*32; p.bStrip=3*c.steps*32 }
		b.Run(fmt.Sprintf("%+v",c), func(b *testing.B){
			for b.Loop() { p.run() }
			b.ReportMetric(2*2*float64(c.m*c.n*c.steps*c.seg*c.lines)*float64(b.N)/b.Elapsed().Seconds()/1e9,"GFLOP/s")
		})
	}
}
