package kernel

import "golang.org/x/sys/unix"

// permitTiles asks Linux to keep this process's tiles, which are large, when
// another one runs: without, the first tile instruction ends the process.
func permitTiles() error {
	const requestPermission, tileData = 0x1023, 18 // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
	if _, _, errno := unix.Syscall(unix.SYS_ARCH_PRCTL, requestPermission, tileData, 0); errno != 0 {
		return errno
	}
	return nil
}
