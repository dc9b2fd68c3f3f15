package saga_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(pgtest.Main(m)) }
